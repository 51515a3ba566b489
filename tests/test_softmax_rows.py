"""Gradients of softmaxes whose probabilities are decoded: what a row has in common changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import targets, watch
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx.config import FewBitConfig
from fewbit_fx.passes.softmax_rows import balanced

EXACT = FewBitConfig(recipe="exact", min_numel=0, strict=True)
CODED = EXACT.updated({"softmax_bits": 8})
DIV, SUM = "aten.div.Tensor", "aten.sum.dim_IntList"


class Sink(nn.Module):
    """Attention in plain operations, whose heads look at the first token nearly always, as pretrained ones do."""

    def __init__(self, narrow: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.register_buffer("sink", torch.zeros(96).index_fill(0, torch.tensor(0), 9.0))
        self.narrow = narrow

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(4, 96, 2, 32).transpose(1, 2) for layer in (self.query, self.key, self.value))
        shares = torch.softmax(q @ k.mT / 32**0.5 + self.sink, -1, dtype=torch.float32).to(self.narrow)
        y = shares.to(v.dtype) @ (v + 2)  # values are alike
        return (y * torch.linspace(-1, 1, 32)).square().mean()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (6, 0.02)])
def test_a_head_that_looks_at_one_token(bits: int, most: float, narrow: torch.dtype) -> None:
    """With even levels, or with sums of rows as they come, these gradients are off by several times themselves."""
    found = fewbit_fx.verify(Sink(narrow), torch.randn(4, 96, 64), fewbit_config=CODED.updated({"softmax_bits": bits}))
    assert found.bytes_after < found.bytes_before
    assert 0 < max(p.relative_error for p in found.parameters) <= most


SOFTMAXES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "of the last dimension": (lambda h: h.softmax(-1), 1),
    "of the first dimension": (lambda h: h.softmax(0), 1),
    "in another precision": (lambda h: h.softmax(-1, dtype=torch.float64).float(), 0),  # float64 is not coded
    "in bfloat16": (lambda h: h.bfloat16().softmax(-1).float(), 1),
    "with a mask": (lambda h: h.masked_fill(torch.ones(128, 64).triu(1).bool(), -torch.inf).softmax(-1), 1),
    "behind dropout": (lambda h: F.dropout(h.softmax(-1), 0.1), 1),
    "two": (lambda h: h.softmax(-1).softmax(-1), 2),
    "log_softmax": (lambda h: h.log_softmax(-1), 0),
    "shares of a sum": (lambda h: (e := h.sigmoid()) / e.sum(-1, keepdim=True), 0),
    "a part of a softmax, scaled": (lambda h: (p := h.softmax(-1)[:, :32]) * (p * h[:, :32]).sum(-1, keepdim=True), 1),
}


def model_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    layer = nn.Linear(64, 64)
    return lambda x: (function(layer(x)) * torch.linspace(-1, 1, 64)[: function(x).shape[-1]]).square().sum()


@pytest.mark.parametrize("name", SOFTMAXES)
def test_which_sums_are_divided(name: str) -> None:
    function, count = SOFTMAXES[name]
    seen = watch(model_of(function), torch.randn(128, 64), config=CODED)
    before, after = (targets(partition.backward) for partition in (seen.plain, seen.chosen))
    assert after.count(SUM) - before.count(SUM) == count


@pytest.mark.parametrize("name", SOFTMAXES)
def test_nothing_is_divided_where_probabilities_are_exact(name: str) -> None:
    function, _ = SOFTMAXES[name]
    seen = watch(model_of(function), torch.randn(128, 64), config=EXACT)
    before, after = (targets(partition.backward) for partition in (seen.plain, seen.chosen))
    assert after.count(SUM) <= before.count(SUM)
    assert after.count(DIV) <= before.count(DIV)


def test_sizes_that_change() -> None:
    layer = nn.Linear(64, 64)
    seen = watch(lambda x: layer(x).softmax(-1).square().sum(), torch.randn(128, 64), config=CODED, dynamic=True)
    (found,) = torch.autograd.grad(seen.output, [layer.weight])
    (expected,) = torch.autograd.grad(layer(seen.inputs[-1]).softmax(-1).square().sum(), [layer.weight])
    assert (found - expected).norm() <= 0.02 * expected.norm()


def test_rows_that_are_all_masked_or_not_finite() -> None:
    p = torch.tensor([[0.0, 0.0], [0.25, 0.75], [torch.nan, 0.5], [0.2, 0.4]])
    total = torch.tensor([[0.0], [3.0], [torch.nan], [3.0]])
    found: Any = balanced(total, p, [-1])
    torch.testing.assert_close(found, torch.tensor([[0.0], [3.0], [torch.nan], [5.0]]), equal_nan=True)
