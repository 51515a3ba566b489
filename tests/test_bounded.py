"""What is bounded is decided by the function's shape, and by no luck of a constant in it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import watch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewbit_fx.codebooks.activations import derivative_of, is_affine
from fewbit_fx.codebooks.density import Typical, Uniform
from fewbit_fx.codebooks.fitting import Codebook
from fewbit_fx.codebooks.sampling import NotCodableError, sample_derivative
from fewbit_fx.codebooks.thresholds import Thresholds
from fewbit_fx.codec.scheme import CodingScheme, fit_scheme
from fewbit_fx.reporting.words import because

Function = Callable[[Tensor], Tensor]


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(math.log(low), math.log(high)).map(math.exp)


SCALE = log_uniform(1e-4, 1e4)
SHARE = st.floats(0, 1)

# Of a scale c of y, a scale k of x, a place a, and a share p.
UNBOUNDED: dict[str, Callable[[float, float, float, float], Function]] = {
    "exp": lambda c, k, a, p: lambda x: c * torch.exp(k * x),
    "exp of -x": lambda c, k, a, p: lambda x: c * torch.exp(-k * x),
    "x exp": lambda c, k, a, p: lambda x: c * x * torch.exp(k * x),
    "exp2": lambda c, k, a, p: lambda x: c * torch.exp2(k * x),
    "expm1": lambda c, k, a, p: lambda x: c * torch.expm1(k * x),
    "cosh": lambda c, k, a, p: lambda x: c * torch.cosh(k * x),
    "sinh": lambda c, k, a, p: lambda x: c * torch.sinh(k * x),
    "even power": lambda c, k, a, p: lambda x: c * (k * x).abs() ** (1.01 + 4 * p),
    "odd power": lambda c, k, a, p: lambda x: c * k * x * (k * x).abs() ** (0.01 + 4 * p),
    "power of relu": lambda c, k, a, p: lambda x: c * F.relu(k * x) ** (1.01 + 4 * p),
    "power with a pole of f'": lambda c, k, a, p: lambda x: c * (k * x - a).abs() ** (0.05 + 0.9 * p),
    "power with a pole of f' at 0": lambda c, k, a, p: lambda x: c * (k * x).abs() ** (0.05 + 0.9 * p),
    "pole": lambda c, k, a, p: lambda x: c / (k * x - a),
    "double pole": lambda c, k, a, p: lambda x: c / (k * x + a) ** 2,
    "two poles": lambda c, k, a, p: lambda x: c * x / ((k * x) ** 2 - a * a),
    "x log": lambda c, k, a, p: lambda x: c * (k * x - a) * torch.log((k * x - a).abs()),
    "x log1p": lambda c, k, a, p: lambda x: c * x * torch.log1p((k * x) ** 2),
    "log": lambda c, k, a, p: lambda x: c * torch.log((k * x).abs()),
    "lgamma": lambda c, k, a, p: lambda x: c * torch.lgamma(k * x),
    "digamma": lambda c, k, a, p: lambda x: c * torch.digamma(k * x),
    "tan": lambda c, k, a, p: lambda x: c * torch.tan(k * x),
    "x sin": lambda c, k, a, p: lambda x: c * x * torch.sin(k * x),
    "squared softplus": lambda c, k, a, p: lambda x: c * F.softplus(k * x) ** 2,
}


@pytest.mark.parametrize("name", UNBOUNDED)
@settings(max_examples=12, deadline=None)
@given(c=SCALE, k=SCALE, a=SCALE, p=SHARE)
def test_no_constant_makes_an_unbounded_derivative_bounded(name: str, c: float, k: float, a: float, p: float) -> None:
    function = UNBOUNDED[name](c, k, a, p)
    with pytest.raises(NotCodableError, match="its derivative grows without bound"):
        sample_derivative(derivative_of(function), Typical())


@settings(max_examples=25, deadline=None)
@example(c=1.0, a=1.6512298162538207e-59, on_tanh=True)
@given(c=SCALE, a=st.floats(-50, 50), on_tanh=st.booleans())
def test_a_weak_pole_is_found_wherever_it_lies(c: float, a: float, on_tanh: bool) -> None:
    """log|x - a| is 7 in size at the grid's nearest point: no more than others are. Far out it has gone.

    Within 1e-50 of 0, where the grid has a point of its own, the value there says that no interval shows the range.
    """

    def function(x: Tensor) -> Tensor:
        pole = (x - a) * torch.log((x - a).abs()) * torch.exp(-((x - a) ** 2))
        return c * (torch.tanh(x) + pole if on_tanh else pole)

    refusal = "its derivative (grows without bound near a point|changes beyond any interval)"
    with pytest.raises(NotCodableError, match=refusal):
        sample_derivative(derivative_of(function), Typical())


BOUNDED: dict[str, Callable[[float, float], Function]] = {
    "tanh": lambda c, k: lambda x: c * torch.tanh(k * x),
    "gelu": lambda c, k: lambda x: c * F.gelu(k * x),
    "softplus": lambda c, k: lambda x: c * F.softplus(k * x),
    "relu": lambda c, k: lambda x: c * F.relu(k * x),
    "softsign": lambda c, k: lambda x: c * F.softsign(k * x),
    "sin": lambda c, k: lambda x: c * torch.sin(k * x),
    "x + sin(x)^2": lambda c, k: lambda x: c * (k * x + torch.sin(k * x) ** 2),
    "1 / (1 + x^2)": lambda c, k: lambda x: c / (1 + (k * x) ** 2),
    "exp(-x^2)": lambda c, k: lambda x: c * torch.exp(-((k * x) ** 2)),
    "asinh": lambda c, k: lambda x: c * torch.asinh(k * x),
}


def coded(function: Function, bits: int = 3) -> CodingScheme:
    """The scheme, whose numbers are all finite in float32."""
    scheme = fit_scheme(derivative_of(function), bits)
    book = scheme.codebook
    flips = [t for plane in scheme.thresholds.flips for t in plane] if scheme.thresholds else []
    assert max(map(abs, (*book.levels, *book.boundaries, *flips))) <= np.finfo(np.float32).max
    assert math.isfinite(book.relative_error)
    assert math.isfinite(book.mean_squared_error)
    return scheme


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=4, deadline=None)
@given(c=SCALE, k=log_uniform(1e-2, 1e2))
def test_bounded_derivatives_of_any_scale_are_coded(name: str, c: float, k: float) -> None:
    assert coded(BOUNDED[name](c, k)).codebook.relative_error < 0.15


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=4, deadline=None)
@given(c=log_uniform(1e-60, 1e60), k=log_uniform(1e-8, 1e8))
def test_extreme_scales_are_coded_or_refused_with_a_reason(name: str, c: float, k: float) -> None:
    with contextlib.suppress(NotCodableError):
        coded(BOUNDED[name](c, k))


def test_written_by_hand_undefined_far_out() -> None:
    """inf / inf beyond 709, and inf alone from 703 on, where the numerator overflows first."""
    by_hand = coded(lambda x: x * torch.exp(x) / (1 + torch.exp(x))).codebook
    assert by_hand.levels == pytest.approx(coded(F.silu).codebook.levels, abs=1e-4)


@pytest.mark.parametrize("k", [1e-2, 1e-3, 1e-4])
def test_a_slow_wave_is_seen_whole(k: float) -> None:
    book = coded(lambda x: torch.sin(k * x)).codebook
    assert book.levels[0] < -0.85 * k < 0.85 * k < book.levels[-1]


def test_what_varies_only_beyond_any_sample_is_refused() -> None:
    with pytest.raises(NotCodableError, match="its derivative changes beyond"):
        fit_scheme(lambda x: 1 / np.log(np.e + np.abs(x)), 3)


@pytest.mark.parametrize("size", [1e39, 1e-39])
def test_what_float32_cannot_hold_is_refused(size: float) -> None:
    for density in (Typical(), Uniform(-3, 3)):
        with pytest.raises(NotCodableError, match=r"its derivative (grows without bound|is of size .* float32)"):
            sample_derivative(lambda x: size / np.cosh(np.clip(x, -300, 300)), density)


def test_a_product_is_one_whatever_its_scale() -> None:
    assert is_affine(lambda x: 1e-20 * x)
    assert not is_affine(lambda x: 1e-20 * np.exp(x))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_a_fault_and_no_code(number: float) -> None:
    for make in (
        lambda: Codebook((0.0, number), 0.1, 0.1),
        lambda: Codebook((-1.7e308, 1.7e308), number, 0.1),
        lambda: Codebook((0.0, 1.0), 0.1, number),
        lambda: Codebook((1.5e308, 1.7e308), 0.1, 0.1),
        lambda: Thresholds((False,), ((number,),)),
    ):
        with pytest.raises(ArithmeticError, match="must be finite"):
            make()


class Between(nn.Module):
    """A function between a trained and a frozen linear layer: only f'(x) needs saving."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.before, self.function = nn.Linear(64, 256), function
        self.after = nn.Linear(256, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x)))


def gradient(model: Between, y: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(y.square().sum(), model.before.weight)
    return found


@pytest.mark.parametrize(
    "function",
    [lambda h: 2 * torch.exp(h), lambda h: torch.exp(4 * h), lambda h: 8 * torch.expm1(h)],
    ids=["2 exp(h)", "exp(4 h)", "8 expm1(h)"],
)
def test_an_exponential_is_left_exact_with_its_reason(function: Function) -> None:
    model, x = Between(function), torch.randn(32, 64)
    seen = watch(model, x)
    assert not seen.coded
    assert any(because(s.reason).startswith("its derivative grows without bound") for s in seen.record.sites)
    found = gradient(model, seen.output)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, gradient(model, model(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 2.0, 1e3])
@pytest.mark.parametrize("name", ["exp", "even power", "pole", "lgamma", "squared softplus"])
def test_the_gradient_of_finite_input_is_finite(name: str, scale: float) -> None:
    model, x = Between(UNBOUNDED[name](scale, 0.7, 50.3, 0.4)), torch.randn(32, 64)
    found = gradient(model, watch(model, x).output)
    assert torch.isfinite(found).all()
    assert torch.allclose(found, gradient(model, model(x)), rtol=1e-4, atol=1e-6 * found.abs().max().item())


@pytest.mark.parametrize("scale", [1e-4, 2.0, 1e3])
@pytest.mark.parametrize("name", ["tanh", "gelu", "sin", "1 / (1 + x^2)"])
def test_the_coded_gradient_of_finite_input_is_finite(name: str, scale: float) -> None:
    model, x = Between(BOUNDED[name](scale, 0.7)), torch.randn(32, 64)
    seen = watch(model, x)
    assert seen.coded
    found, exact = gradient(model, seen.output), gradient(model, model(x))
    assert (found - exact).norm() < 0.2 * exact.norm()
