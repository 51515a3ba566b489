"""Results that a leaner cut saves: a copy, for the caller may write to them before the backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import Seen, saved_dtypes, watch
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx.config import FewBitConfig

EXACT = FewBitConfig(recipe="exact", strict=True, min_numel=0)


class ReturnsWhatItReads(nn.Module):
    """The leaner cut saves h, of which torch.compile saves three results of pointwise operations.

    With a step of 2 it saves every second element of h: a copy of these would have other strides.
    """

    def __init__(self, step: int = 1) -> None:
        super().__init__()
        self.step, self.first = step, nn.Linear(32, 64)
        self.layers = nn.ModuleList(nn.Linear(64 // step, 8) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        read = h[:, :: self.step]
        a, b, c = self.layers
        return h.view(-1), a(read.sigmoid()) + b(2 * read) + c(-read)


def copies(seen: Seen) -> int:
    returned = {id(n) for n in seen.chosen.saved()}
    clones = [n for n in seen.chosen.forward.graph.nodes if n.target is torch.ops.aten.clone.default]
    return sum(id(n) in returned for n in clones)


def test_a_leaner_cut_saves_a_copy_of_a_result() -> None:
    seen = watch(ReturnsWhatItReads(), torch.randn(16, 32), config=EXACT)
    assert seen.record.computes_again
    assert copies(seen) == 1
    assert not seen.chosen.saved_results()
    assert saved_dtypes(seen.chosen).count(torch.float32) == len(saved_dtypes(seen.chosen))
    size = 16 * 64 * 4
    data = 16 * 32 * 4
    assert (seen.record.plain_bytes, seen.record.fewbit_bytes) == (3 * size + data, size + data)


def test_one_whose_copies_would_have_other_strides_is_not_taken() -> None:
    seen = watch(ReturnsWhatItReads(step=2), torch.randn(16, 32), config=EXACT)
    assert seen.chosen.saved_results() <= seen.plain.saved_results()
    assert copies(seen) == 0


def test_what_torch_compile_saves_itself_is_not_copied() -> None:
    seen = watch(lambda x: (y := torch.sigmoid(x @ torch.eye(32)), y.sum()), torch.randn(64, 32, requires_grad=True))
    assert copies(seen) == 0


@pytest.mark.one_in(2)
@pytest.mark.parametrize("recipe", ["exact", "lean"])
def test_with_kernels_a_result_that_is_written_to_leaves_the_gradient_right(recipe: str) -> None:
    torch.manual_seed(0)
    model, x = ReturnsWhatItReads(), torch.randn(16, 32)

    def gradient(backend: object, write: bool) -> Tensor:
        torch.compiler.reset()
        h, y = torch.compile(model, backend=backend)(x)
        if write:
            h.detach().mul_(7)
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(F.mse_loss(y, y.detach() + 1), list(model.parameters()))]
        )

    backend = fewbit_fx.backend(recipe=recipe, min_numel=0, strict=True)
    assert torch.equal(gradient(backend, write=True), gradient(backend, write=False))
