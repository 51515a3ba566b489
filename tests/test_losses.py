"""Derivatives of losses: their arguments go to 0 in training, where no level of a codebook is near them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT, watch
from torch import Tensor

from fewbit_fx.passes.representations.derivative_codes import LOSS, PERHAPS_LOSS
from fewbit_fx.passes.sites import DerivativeSite, Origin
from fewbit_fx.reporting.words import action

MASK = torch.rand(64, 64) > 0.3
WEIGHT = torch.rand(64, 1)
MATRIX = torch.randn(64, 64) / 8

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "pseudo-Huber": lambda d: torch.sqrt(1 + d * d) - 1,
    "log cosh": lambda d: torch.log(torch.cosh(d)),
    "Cauchy": lambda d: torch.log1p(d * d),
    "Charbonnier": lambda d: torch.sqrt(d * d + 1e-6),
    "Geman-McClure": lambda d: d * d / (1 + d * d),
    "Welsch": lambda d: 1 - torch.exp(-d * d / 2),
    "logistic": lambda d: F.softplus(-d),
    "tanh squared": lambda d: torch.tanh(d) ** 2,
    "arctan": lambda d: d * torch.atan(d),
}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda e: e.mean(),
    "sum": lambda e: e.sum(),
    "scaled": lambda e: 0.1 * e.sum() / 64,
    "by row, then weighted": lambda e: (e.mean(1, keepdim=True) * WEIGHT).sum(),
    "masked": lambda e: (e * MASK).sum() / MASK.sum(),
    "selected": lambda e: e[:, 3:40].mean(),
    "a mean of each row": lambda e: e.mean(1),
    "in float16": lambda e: e.half().mean(),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_derivative_of_a_loss_is_left_exact(name: str, reduction: str) -> None:
    def run(x: Tensor) -> Tensor:
        return REDUCTIONS[reduction](LOSSES[name](x * 2 - 1))

    x = (0.5 + 0.01 * torch.randn(64, 64)).requires_grad_()
    seen = watch(run, x)
    assert not [s for s in seen.coded if s.dtype != "bool"]
    (found,) = torch.autograd.grad(seen.output.sum(), x)
    (exact,) = torch.autograd.grad(run(x).sum(), x)
    torch.testing.assert_close(found, exact, rtol=1e-2 if "16" in reduction else 1e-4, atol=1e-9)


def test_the_report_says_that_it_is_a_loss() -> None:
    seen = watch(lambda x: LOSSES["log cosh"](x).mean(), torch.randn(64, 64, requires_grad=True))
    assert [s.reason for s in seen.record.sites] == [LOSS]


@pytest.mark.parametrize("name", ["pseudo-Huber", "log cosh", "Cauchy", "Charbonnier"])
def test_a_loss_reduced_outside_of_the_graph_is_left_exact(name: str) -> None:
    """A full gradient comes from nobody knows where; these derivatives vanish at 0, so the report could not hold."""
    x = (0.01 * torch.randn(64, 64)).requires_grad_()
    seen = watch(lambda x: LOSSES[name](x * 1), x)
    assert not seen.coded
    assert PERHAPS_LOSS in {s.reason for s in seen.record.sites}


@pytest.mark.parametrize("function", [F.gelu, F.silu, torch.tanh, F.mish, F.softplus])
def test_an_activation_at_the_end_of_a_graph_is_coded(function: Callable[[Tensor], Tensor]) -> None:
    """Unless its output, which the graph returns, determines its derivative."""
    seen = watch(lambda x: function(x @ MATRIX) * 1.5, torch.randn(64, 64, requires_grad=True))
    assert [action(s) for s in seen.record.sites] == ["coded in 3 bits"]


def test_an_activation_before_a_mean_pool_and_a_layer_is_no_loss() -> None:
    seen = watch(lambda x: F.gelu(x @ MATRIX).mean(0, keepdim=True) @ MATRIX, torch.randn(64, 64, requires_grad=True))
    (site,) = seen.sites
    assert isinstance(site, DerivativeSite)
    assert site.origin is Origin.LAYER
    assert [action(s) for s in seen.coded] == ["coded in 3 bits"]


def test_an_activation_under_a_loss_and_a_layer_is_coded() -> None:
    """A penalty on activations beside the next layer's gradient."""

    def run(x: Tensor) -> Tensor:
        y = F.gelu(x @ MATRIX)
        return (y @ MATRIX).mean() + 0.1 * y.sum()

    assert [action(s) for s in watch(run, torch.randn(64, 64, requires_grad=True), config=STRICT).coded] == [
        "coded in 3 bits"
    ]
