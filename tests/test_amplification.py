"""What the backward computes from codes: no function of them may be much more wrong than they are."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import watch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fewbit_fx.config import FewBitConfig
from fewbit_fx.passes.graph import descendants, placeholders
from fewbit_fx.passes.reasons import Cause
from fewbit_fx.passes.sites.amplification import amplification

amplification_module = sys.modules["fewbit_fx.passes.sites.amplification"]

DEFAULT = FewBitConfig(min_numel=0, strict=True)
SENSITIVE = 90  # at which the error of 8-bit codes is half of what is computed

Function = Callable[[Tensor], Tensor]


def growth(function: Function) -> float:
    """Of the error of a tensor that a gradient is multiplied with a function of."""
    made = make_fx(lambda x, tangents: function(x) * tangents, select_decomp_table(), "fake")
    graph = made(torch.randn(8, 8), torch.randn(8, 8)).graph
    x, tangents = placeholders(graph)
    return amplification(x, descendants([tangents]), lambda node: False)


def slope(function: Function) -> Function:
    """Its derivative, in the operations that torch.compile has for it."""

    def derivative(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(function(x), x, torch.ones_like(x))
        return found

    return derivative


ACTIVATIONS = [torch.sigmoid, torch.tanh, F.silu, F.gelu, F.relu, F.softplus, F.elu, F.hardswish, F.mish, torch.erf]


@pytest.mark.parametrize("function", ACTIVATIONS, ids=lambda f: f.__name__)
def test_activations_and_their_slopes_are_about_as_wrong_as_codes(function: Function) -> None:
    for each in (function, slope(function)):
        assert 1 <= growth(each) < SENSITIVE / 4


@pytest.mark.parametrize(
    "function",
    [lambda x: x, lambda x: x.view(4, 16).t().bfloat16().float().t().view(8, 8), torch.neg, torch.abs],
    ids=["itself", "moved", "neg", "abs"],
)
def test_what_is_the_same_number_is_as_wrong(function: Function) -> None:
    assert growth(function) == pytest.approx(1)


@pytest.mark.parametrize("function", [torch.square, lambda x: (1 + x * x).sqrt(), lambda x: torch.log1p(x.abs())])
def test_smooth_functions_are_not_much_more_wrong(function: Function) -> None:
    assert growth(function) < 4


@pytest.mark.parametrize("function", [torch.cos, torch.sin, torch.exp, torch.reciprocal, lambda x: 1 / (x * x)])
def test_oscillations_exponentials_and_poles_are_wrong_altogether(function: Function) -> None:
    assert growth(function) > SENSITIVE
    assert growth(lambda x: 2 * function(x + 1)) > SENSITIVE


def rotated(x: Tensor, positions: Tensor, frequencies: Tensor, w: Tensor) -> Tensor:
    """As models of Hugging Face rotate: the angles are a product of matrices, which no cut computes again."""
    angles = positions[:, None] @ frequencies[None]
    both = torch.cat([angles, angles], -1)
    q = x @ w
    left, right = q.chunk(2, -1)
    return q * both.cos() + torch.cat([-right, left], -1) * both.sin()


def test_angles_stay_exact() -> None:
    tokens, width = 512, 64
    frequencies = 10_000 ** (-torch.arange(width // 2) * 2 / width)
    x, w = torch.randn(tokens, width), torch.randn(width, width, requires_grad=True)
    seen = watch(rotated, x, torch.arange(tokens).float(), frequencies, w, config=DEFAULT)
    angles = [s for s in seen.record.sites if s.reason and s.reason.cause is Cause.ERROR_TOO_LARGE]
    assert [s.shape for s in angles] == [(tokens, width // 2)]
    (found,) = torch.autograd.grad(seen.output.square().sum(), w)
    (exact,) = torch.autograd.grad(rotated(x, torch.arange(tokens).float(), frequencies, w).square().sum(), w)
    assert (found - exact).norm() <= 1e-5 * exact.norm()


def test_a_program_that_cannot_be_run_tells_of_no_bound() -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no")

    with mock.patch.object(amplification_module, "_run", refuse):
        assert growth(lambda x: torch.sigmoid(3 * x - 7)) == math.inf
