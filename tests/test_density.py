"""Densities: weights of a distribution, points where they should lie, and texts that say what is allowed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbit_fx.codebooks.density import Density, Extent, Normal, Observed, Typical, Uniform, parse_density

numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
positive = st.floats(1e-6, 1e6)
intervals = st.tuples(numbers, positive).map(lambda t: (t[0], t[0] + t[1])).filter(lambda t: t[0] < t[1])
ends = st.lists(positive, max_size=2).map(lambda e: tuple(sign * x for sign, x in zip((-1, 1), e, strict=False)))
extents = st.builds(Extent, positive, ends)
densities: st.SearchStrategy[Density] = st.one_of(
    st.just(Uniform()),
    intervals.map(lambda t: Uniform(*t)),
    st.builds(Normal, numbers, positive),
    st.just(Typical()),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20).map(lambda x: Observed(torch.tensor(x))),
)


def never() -> Extent:
    raise AssertionError("this density says where x lies by itself")


@given(densities, extents)
def test_weights_are_a_distribution_over_finite_points(density: Density, extent: Extent) -> None:
    x, weights = density.points(lambda: extent)
    assert x.shape == weights.shape
    assert x.ndim == 1
    assert x.dtype == weights.dtype == np.float64
    assert np.isfinite(x).all()
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-9)


@given(intervals)
def test_a_fixed_interval_is_covered_evenly_and_asks_for_no_extent(interval: tuple[float, float]) -> None:
    x, weights = Uniform(*interval).points(never)
    assert (x[0], x[-1]) == interval
    assert np.ptp(weights) == 0


@given(extents)
def test_without_an_interval_it_is_that_where_the_function_varies(extent: Extent) -> None:
    x, _ = Uniform().points(lambda: extent)
    assert (x[0], x[-1]) == (-extent.reach, extent.reach)


@given(numbers, positive)
def test_a_normal_density_has_its_mean_and_deviation(mean: float, std: float) -> None:
    x, weights = Normal(mean, std).points(never)
    assert np.average(x, weights=weights) == pytest.approx(mean, abs=1e-6 * std + 1e-9 * abs(mean))
    found = math.sqrt(np.average((x - mean) ** 2, weights=weights))
    assert found == pytest.approx(std, rel=1e-4, abs=1e-9 * abs(mean))


def test_typical_x_lies_within_but_for_a_few_per_cent() -> None:
    x, weights = Typical().points(lambda: Extent(3.0, (-80.0, 80.0)))
    beyond = weights[np.abs(x) > 3.0].sum()
    at_limits = weights[np.abs(x) == 80.0].sum()
    assert beyond == pytest.approx(0.035 / 1.035, rel=0.01)
    assert at_limits == pytest.approx(0.02 / 1.035)
    assert np.abs(x)[np.abs(x) < 80.0].max() == pytest.approx(30.0), "ten times as far as the function varies"
    assert np.average(x, weights=weights) == pytest.approx(0, abs=1e-9)


@given(positive)
def test_typical_x_stays_within_where_the_function_never_settles(reach: float) -> None:
    x, weights = Typical().points(lambda: Extent(reach))
    assert (x.min(), x.max()) == (-reach, reach)
    deviation = math.sqrt(np.average(x**2, weights=weights)) / reach
    assert 1 / 3 < deviation < 0.4, "a third, and more for the uniform floor"


def test_observed_values_are_points_as_they_are() -> None:
    values = torch.tensor([[0.5, -1.0], [0.5, 2.0]], dtype=torch.bfloat16)
    x, weights = Observed(values).points(never)
    assert x.tolist() == [0.5, -1.0, 0.5, 2.0]
    assert weights.tolist() == [0.25] * 4


@given(st.one_of(intervals.map(lambda t: Uniform(*t)), st.builds(Normal, numbers, positive)))
def test_numbers_are_read_as_python_writes_them(density: Uniform | Normal) -> None:
    kind, values = type(density).__name__.lower(), vars(density).values()
    assert parse_density(f"{kind}:{','.join(map(repr, values))}") == density


ALLOWED = "allowed is uniform, uniform:LOW,HIGH, normal:MEAN,STD, typical, or a .npy or .pt file of pre-activations"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gauss",
        "Uniform",
        "uniform:1",
        "uniform:1,2,3",
        "normal:a,b",
        "normal:1",
        "typical:1",
        "missing.npy",
        "x.csv",
    ],
)
def test_a_text_of_no_density_is_named_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="density is") as error:
        parse_density(text)
    assert str(error.value) == f"density is {text!r}; {ALLOWED}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:2,1", "Uniform's ends must be finite and ascend; got low=2.0, high=1.0"),
        ("uniform:1,1", "Uniform's ends must be finite and ascend; got low=1.0, high=1.0"),
        ("uniform:-inf,1", "Uniform's ends must be finite and ascend; got low=-inf, high=1.0"),
        ("uniform:0,nan", "Uniform's ends must be finite and ascend; got low=0.0, high=nan"),
        ("normal:0,0", "Normal takes a finite mean and a std above 0; got 0.0 and 0.0"),
        ("normal:0,-1", "Normal takes a finite mean and a std above 0; got 0.0 and -1.0"),
        ("normal:inf,1", "Normal takes a finite mean and a std above 0; got inf and 1.0"),
    ],
)
def test_numbers_that_are_not_allowed_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="got") as error:
        parse_density(text)
    assert str(error.value) == message


@pytest.mark.parametrize("given_ends", [{"low": 1.0}, {"high": 1.0}])
def test_one_end_alone(given_ends: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="both ends or none; got low="):
        Uniform(**given_ends)


@pytest.mark.parametrize(
    "x", [torch.empty(0, 3), torch.tensor([1, 2]), torch.tensor([1.0, math.nan]), torch.tensor([math.inf])], ids=str
)
def test_observed_values_must_be_finite_floats(x: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match="Observed takes a floating point tensor of finite values, not empty; got shape"
    ):
        Observed(x)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    for name, save in (("x.npy", lambda p: p.write_bytes(b"no array")), ("x.pt", lambda p: torch.save({"x": 1}, p))):
        path = tmp_path / name
        save(path)
        with pytest.raises(ValueError, match="density file") as error:
            parse_density(str(path))
        assert repr(str(path)) in str(error.value)


@pytest.mark.parametrize(
    ("density", "words"),
    [
        (Uniform(), "uniform where it varies"),
        (Uniform(-1, 2.5), "uniform on [-1, 2.5]"),
        (Normal(0, 2), "normal, mean 0, std 2"),
        (Observed(torch.ones(3000)), "3,000 observed values"),
    ],
)
def test_words_for_a_density(density: Density, words: str) -> None:
    assert str(density) == words
