"""Which codes buy memory, decided on partitions of small real models, each by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import Seen, mlp, watch
from torch import Tensor, nn

from fewbit_fx.passes.gain import NEEDED, NOT_SAVED, NOT_SMALLER, RETURNED, Gain
from fewbit_fx.passes.reasons import Reason


def reasons(seen: Seen, cost: int = 1) -> list[Reason | None]:
    """Of each site by name, if a code takes so many bytes; None where it buys memory."""
    useless = Gain(seen.plain).useless(dict.fromkeys(seen.sites, cost))
    return [useless.get(site) for site in seen.sites]


def test_a_code_of_what_only_the_derivative_reads_buys_memory() -> None:
    seen = watch(mlp(nn.GELU(), frozen=True), torch.randn(64, 32))
    assert reasons(seen) == [None]


def test_a_code_as_large_as_the_tensor_buys_nothing() -> None:
    seen = watch(mlp(nn.GELU(), frozen=True), torch.randn(64, 32))
    size = 64 * 64 * 4
    assert reasons(seen, size - 1) == [None]
    assert reasons(seen, size) == [NOT_SMALLER]


def test_what_the_backward_reads_otherwise_is_kept() -> None:
    class ReadTwice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.other = nn.Linear(32, 64), nn.Linear(64, 8), nn.Linear(64, 8)
            self.down.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return self.down(F.gelu(h)) + self.other(h)

    assert reasons(watch(ReadTwice(), torch.randn(64, 32))) == [NEEDED]


def test_what_is_returned_may_live_on() -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 8).requires_grad_(False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.up(x)
            return self.down(F.gelu(h)), h

    assert reasons(watch(Returned(), torch.randn(64, 32))) == [RETURNED]


def test_what_follows_from_a_parameter_is_not_saved() -> None:
    class OfAWeight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ F.gelu(self.weight)

    assert reasons(watch(OfAWeight(), torch.randn(64, 32))) == [NOT_SAVED]


def test_two_codes_share_what_they_free() -> None:
    """Each buys half a tensor: codes of more than half of it buy nothing together, so one goes, and the other stays."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(32, 64)
            self.one, self.two = (nn.Linear(64, 8).requires_grad_(False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return self.one(F.gelu(h)) + self.two(F.silu(h))

    seen = watch(Twice(), torch.randn(64, 32))
    half = 64 * 64 * 4 // 2
    assert reasons(seen, half - 1) == [None, None]
    assert set(reasons(seen, half)) == {NOT_SMALLER}
