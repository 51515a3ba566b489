"""Codebooks are the optimum, by value, over the interval where the function varies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import codebook_of, derivative
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit_fx.codebooks.activations import ACTIVATIONS, is_affine, recognise
from fewbit_fx.codebooks.density import Typical
from fewbit_fx.codebooks.fitting import Codebook, fit_codebook, optimal_levels
from fewbit_fx.codebooks.sampling import NotCodableError, sample_derivative

BOUNDED = [n for n in ACTIVATIONS if n not in ("squared relu", "exp", "square")]


def squared_error(points: np.ndarray, mass: np.ndarray, levels: np.ndarray) -> float:
    return float(np.sum(mass * ((points[:, None] - levels[None]) ** 2).min(1)))


def brute_force(points: np.ndarray, mass: np.ndarray, k: int) -> float:
    """The least error over all ways to cut the points into k runs."""
    best = math.inf
    for cuts in itertools.combinations(range(1, len(points)), k - 1):
        runs = itertools.pairwise((0, *cuts, len(points)))
        levels = [np.average(points[a:b], weights=mass[a:b]) for a, b in runs]
        best = min(best, squared_error(points, mass, np.array(levels)))
    return best


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.integers(-50, 50), min_size=1, max_size=10, unique=True),
    weights=st.lists(st.integers(1, 100), min_size=10, max_size=10),
    k=st.integers(1, 8),
)
def test_dynamic_program_equals_brute_force(values: list[int], weights: list[int], k: int) -> None:
    points = np.sort(np.array(values, dtype=np.float64)) / 7
    mass = np.array(weights[: len(points)], dtype=np.float64)
    levels = optimal_levels(points, mass, k)
    assert len(levels) <= k
    assert squared_error(points, mass, levels) == pytest.approx(
        brute_force(points, mass, min(k, len(points))), abs=1e-9
    )


def test_levels_ascend_and_boundaries_lie_between() -> None:
    codebook = codebook_of(torch.nn.functional.gelu, 4)
    assert codebook.bits == 4
    assert list(codebook.levels) == sorted(set(codebook.levels))
    assert all(a < b < c for a, b, c in zip(codebook.levels, codebook.boundaries, codebook.levels[1:], strict=False))


def test_fewer_distinct_values_than_levels_are_kept_exactly() -> None:
    codebook = fit_codebook(np.array([0.0, 1.0, 1.0, 0.5]), np.ones(4), bits=3)
    assert codebook == Codebook((0.0, 0.5, 1.0), 0.0, 0.0)
    assert codebook.bits == 2


def test_known_squared_errors_of_gelu() -> None:
    """Uniform weight on [-100, 100], as the paper's library measures: its table has .0120 and .0041."""
    x = torch.linspace(-10, 10, 200_001)  # beyond, the derivative is 0 or 1
    values = derivative(torch.nn.functional.gelu, x).numpy()
    weights = np.full(len(values), 1e-4)
    for bits, bound in ((3, 0.0083), (4, 0.0022)):
        levels = np.array(fit_codebook(values, weights, bits).levels)
        assert squared_error(values[::10], 10 * weights[::10], levels) < bound


@pytest.mark.parametrize("name", BOUNDED)
def test_error_falls_with_bits_for_every_activation(name: str) -> None:
    errors = [codebook_of(ACTIVATIONS[name], bits).relative_error for bits in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.06


@pytest.mark.parametrize(
    ("stretched", "plain"),
    [
        (lambda x: 50 * torch.tanh(x / 50), torch.tanh),
        (lambda x: torch.nn.functional.softplus(x, beta=0.1), torch.nn.functional.softplus),
        (lambda x: torch.nn.functional.gelu(20 * x) / 20, torch.nn.functional.gelu),
    ],
)
def test_codebook_fits_the_functions_own_scale(stretched, plain) -> None:  # type: ignore[no-untyped-def]
    for bits in (1, 2, 3, 4):
        ours = codebook_of(stretched, bits).relative_error
        assert ours == pytest.approx(codebook_of(plain, bits).relative_error, rel=0.02)


@pytest.mark.parametrize("function", [torch.sin, lambda x: x + torch.sin(x) ** 2, lambda x: torch.exp(-x * x)])
def test_periodic_and_humped_derivatives_are_codable(function) -> None:  # type: ignore[no-untyped-def]
    assert codebook_of(function, 3).relative_error < 0.15


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x**3, "without bound"),
        (lambda x: torch.relu(x) ** 2, "without bound"),
        (torch.exp, "without bound|not defined"),
        (torch.reciprocal, "without bound near a point"),
        (torch.log, "without bound near a point"),
        (lambda x: torch.sqrt(x), "not defined"),
        (lambda x: 2 * x + 1, "constant"),
    ],
)
def test_what_cannot_be_coded_says_why(function, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NotCodableError, match=reason):
        sample_derivative(lambda x: derivative(function, torch.from_numpy(x)).numpy(), Typical())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_recognised_by_its_derivative(name: str) -> None:
    found = recognise(lambda x: derivative(ACTIVATIONS[name], torch.from_numpy(x)).numpy())
    assert name in (found or "").split(" or ")


def test_an_unknown_derivative_is_not_recognised() -> None:
    assert recognise(lambda x: np.cos(3 * x)) is None
    assert is_affine(lambda x: 3 * x - 1)
    assert not is_affine(np.cos)
