"""Far out, where a derivative has reached its limit, the error falls with the bits as it does elsewhere."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit_fx.codebooks.activations import ACTIVATIONS, derivative_of
from fewbit_fx.codebooks.density import Extent, Normal, Typical
from fewbit_fx.codebooks.fitting import Array, Codebook, fit_codebook
from fewbit_fx.codebooks.of_functions import codebook
from fewbit_fx.codec.scheme import fit_scheme

SMOOTH = [
    "gelu",
    "gelu (tanh)",
    "quick gelu",
    "silu",
    "mish",
    "sigmoid",
    "logsigmoid",
    "tanh",
    "tanhshrink",
    "softsign",
    "softplus",
    "elu",
    "celu",
    "selu",
    "hardswish",
    "atan",
]
FAR = np.array([-1e30, -1e4, -1e3, -100.0, 100.0, 1e3, 1e4, 1e30])


def far_error(book: Codebook, derivative, x: Array) -> float:  # type: ignore[no-untyped-def]
    """The largest error at far x, as a share of the largest derivative."""
    exact = derivative(x)
    return float(np.abs(book.nearest(exact) - exact).max() / np.abs(derivative(np.linspace(-10, 10, 20_001))).max())


def error_on(book: Codebook, exact: Array) -> float:
    return float(np.linalg.norm(book.nearest(exact) - exact) / np.linalg.norm(exact))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", SMOOTH)
def test_the_error_far_out_falls_with_the_bits(name: str) -> None:
    """By half for each bit at least; the share may rise by little from one to the next."""
    derivative = derivative_of(ACTIVATIONS[name])
    errors = [far_error(codebook(name, bits, "typical"), derivative, FAR) for bits in range(1, 9)]
    for bits, error in enumerate(errors, start=1):
        assert error < 0.6 * 2.0**-bits
    assert all(later < earlier + 1.5e-3 for earlier, later in itertools.pairwise(errors[2:]))
    assert errors[7] < 1.5e-3


@pytest.mark.one_in(8)
@pytest.mark.parametrize("x", [-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])
@pytest.mark.parametrize("name", [n for n in SMOOTH if n not in ("softsign", "atan")])  # they have not settled by 20
def test_saturated_units_keep_almost_no_error(name: str, x: float) -> None:
    assert far_error(codebook(name, 8, "typical"), derivative_of(ACTIVATIONS[name]), np.array([x])) < 1.5e-3


@pytest.mark.one_in(3)
@pytest.mark.parametrize("std", [1.0, 3.0, 10.0, 30.0])
@pytest.mark.parametrize("name", SMOOTH)
def test_the_report_holds_for_wide_data(name: str, std: float) -> None:
    book = codebook(name, 8, "typical")
    exact = derivative_of(ACTIVATIONS[name])(std * np.random.default_rng(0).normal(size=20_000))
    slow = name in ("softsign", "atan")  # a few large values of f' among many small ones
    assert error_on(book, exact) < (0.01 if slow else 0.005)
    assert slow or error_on(book, exact) < 2.1 * book.relative_error


@pytest.mark.parametrize(
    ("name", "without_tails"), [("gelu", 0.0641), ("silu", 0.0560), ("tanh", 0.0528), ("sigmoid", 0.0528)]
)
def test_the_tails_cost_little_where_data_are(name: str, without_tails: float) -> None:
    """The error at 3 bits where f' varies, against that of levels that know nothing of its limits."""
    derivative = derivative_of(ACTIVATIONS[name])
    reach = {"gelu": 2.98, "silu": 6.04, "tanh": 2.995, "sigmoid": 5.99}[name]
    x, weights = Typical().points(lambda: Extent(reach))
    values = derivative(x)
    assert fit_codebook(values, weights, 3).relative_error == pytest.approx(without_tails, abs=1e-4)
    book = codebook(name, 3, "typical")
    squares = np.average((book.nearest(values) - values) ** 2, weights=weights)
    assert math.sqrt(squares / np.average(values**2, weights=weights)) < 1.025 * without_tails


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(["gelu", "silu", "tanh", "softplus", "elu"]),
    c=st.floats(-9, 9).map(math.exp),
    k=st.floats(-4, 4).map(math.exp),
    bits=st.integers(2, 8),
)
def test_the_levels_scale_with_the_function(name: str, c: float, k: float, bits: int) -> None:
    plain = codebook(name, bits, "typical")
    scaled = codebook(lambda x: c * ACTIVATIONS[name](k * x), bits, "typical")
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=0.02)
    derivative = derivative_of(ACTIVATIONS[name])
    ours = Codebook(tuple(level / (c * k) for level in scaled.levels), 0.0, 0.0)
    assert far_error(ours, derivative, FAR) < 0.6 * 2.0**-bits


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("name", ["gelu", "silu", "tanh", "softplus", "softsign"])
def test_codes_from_x_are_the_nearest_level_far_out_too(name: str, bits: int) -> None:
    derivative = derivative_of(ACTIVATIONS[name])
    scheme = fit_scheme(derivative, bits)
    assert scheme.thresholds is not None
    x = torch.cat((torch.linspace(-40, 40, 4001), torch.logspace(1, 30, 500), -torch.logspace(1, 30, 500)))
    planes = scheme.bits(x, lambda x: x, compiled=False)
    codes = sum(plane.long() << (bits - 1 - index) for index, plane in enumerate(planes))
    values = derivative(x.double().numpy())
    ranks = scheme.codebook.ranks(values)
    at_boundary = np.abs(values[:, None] - np.array(scheme.codebook.boundaries)).min(1) < 1e-9
    assert (torch.from_numpy(ranks ^ (ranks >> 1)).eq(codes).numpy() | at_boundary).all()


def test_tails_lie_on_the_sides_where_the_derivative_settles() -> None:
    for ends in ((), (1e30,), (-1e30, 1e30)):
        x, weights = Typical().points(lambda ends=ends: Extent(4.0, ends))  # type: ignore[misc]
        assert weights.sum() == pytest.approx(1)
        assert {float(far) for far in x[np.abs(x) > 40.001]} == set(ends)
        assert weights[np.abs(x) > 4.0].sum() == pytest.approx(0.017 * len(ends), abs=1e-3)
    one_sided = fit_scheme(lambda x: np.where(x < 0, np.exp(np.minimum(x, 0)), 1 + np.sin(x)), 8)
    assert one_sided.codebook.levels[0] < 1.5e-3


def test_densities_that_say_where_x_lies_have_no_tails() -> None:
    x, _ = Normal(0, 2).points(lambda: Extent(1.0, (-1e30, 1e30)))
    assert np.abs(x).max() == 12
