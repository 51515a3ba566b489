"""Levels fitted to a sample of the tensor: how good they are, and that they are what the module says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Lambda, derivative, gradients, mlp, watch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewbit_fx.codebooks.density import Typical
from fewbit_fx.codebooks.sampling import sample_derivative
from fewbit_fx.codebooks.thresholds import has_jumps
from fewbit_fx.codec.bitplanes import plane_layout
from fewbit_fx.codec.encode_decode import at_least_float32
from fewbit_fx.codec.sampled_levels import Axis, SampledScheme
from fewbit_fx.codec.scheme import CodingScheme, choose_scheme
from fewbit_fx.config import FewBitConfig

SAMPLED = FewBitConfig(recipe="derivatives", levels="sampled", strict=True, min_numel=0)
SMOOTH = {
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "mish": F.mish,
    "elu": F.elu,
    "softplus": F.softplus,
}
OTHERS = {"hardswish": F.hardswish, "selu": F.selu, "sin": torch.sin, "sigmoid": torch.sigmoid, "softsign": F.softsign}
SPREADS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def array_derivative(function: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    def slope(x: np.ndarray) -> np.ndarray:
        with torch.enable_grad():
            return derivative(function, torch.from_numpy(np.array(x))).numpy()

    return slope


def in_dtype(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The derivative as a graph computes it, rounded to float32 at most."""

    def slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return derivative(function, x).to(torch.float64 if x.dtype == torch.float64 else torch.float32)

    return slope


def scheme_of(function: Callable[[Tensor], Tensor], bits: int = 3) -> SampledScheme:
    scheme = choose_scheme(array_derivative(function), bits)
    assert isinstance(scheme, SampledScheme)
    return scheme


@pytest.mark.parametrize("name", SMOOTH)
def test_errors_are_within_8_percent_however_narrow_or_wide_x_is(name: str) -> None:
    torch.manual_seed(0)
    function, scheme = SMOOTH[name], scheme_of(SMOOTH[name])
    for spread in SPREADS:
        squared, power, of_constant = 0.0, 0.0, 0.0
        for _ in range(8):  # tensors, each with levels of its own
            x = spread * torch.randn(64, 512)
            exact, coded = derivative(function, x), scheme.coded(x, in_dtype(function))
            squared += (coded - exact).square().sum().item()
            power += exact.square().sum().item()
            of_constant += (exact - exact.mean()).square().sum().item()
        assert squared <= 0.08**2 * power, spread
        assert squared < of_constant, spread


@pytest.mark.one_in(2)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("name", [*SMOOTH, *OTHERS])
def test_the_sample_itself_is_coded_no_worse_than_by_the_best_constant(name: str, bits: int) -> None:
    """A tensor that is its own sample: levels are means of intervals, and a mean is the best constant there."""
    torch.manual_seed(1)
    function = {**SMOOTH, **OTHERS}[name]
    scheme = scheme_of(function, bits)
    for x in (torch.randn(480), 3 + 0.01 * torch.randn(480), torch.randn(480).round(), torch.full((480,), 0.5)):
        exact, coded = derivative(function, x), scheme.coded(x, in_dtype(function)).double()
        rounding = 1e-6 * exact.norm()  # float32, and anchors of a millionth of an element
        assert (coded - exact).norm() <= (exact - exact.mean()).norm() + rounding


def reference(scheme: SampledScheme, function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and levels, from the module's text alone: by loops, in float64. Levels ascend along the axis."""
    slope = array_derivative(function)
    strides = (0x9E3779B1, 0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A)
    drawn = []
    for number in range(480):
        where = tuple((number * strides[d % 5] % 2**32 * n) >> 32 for d, n in enumerate(x.shape))
        value = float(x[where])
        drawn.append(value if np.isfinite(value) else 0.0)
    anchors = [0.25 * 2 ** (i / 2) for i in range(16)]
    one_side = scheme.axis in (Axis.MAGNITUDE, Axis.SIDES)
    points = [(abs(p) if one_side else p, 1.0) for p in drawn]
    points += [(a, 1e-6) for a in anchors] + ([] if one_side else [(-a, 1e-6) for a in anchors])
    if scheme.axis is Axis.DERIVATIVE:
        points = [(float(v), w) for v, (_, w) in zip(slope([p for p, _ in points]), points, strict=True)]
    points.sort()
    at, weight = np.array(points).T
    values = at if scheme.axis is Axis.DERIVATIVE else slope(at)
    rise = np.abs(np.diff(values)) ** (2 / 3)
    real = np.flatnonzero(weight == 1)
    beyond = np.ones(len(rise), dtype=bool)
    beyond[real[0] : real[-1]] = False
    rise[beyond] *= min(1.0, 0.6 * rise[~beyond].sum() / rise[beyond].sum()) if rise[beyond].any() else 1.0
    sums = np.cumsum(rise)
    intervals = 2 ** (scheme.code_bits - scheme.mirrored)
    firsts = [1 + int((sums < sums[-1] * j / intervals).sum()) for j in range(1, intervals)]
    thresholds = np.array([(at[i - 1] + at[i]) / 2 for i in firsts])
    ranks = np.array([(p > thresholds).sum() for p in at])
    levels = []
    for rank, first in enumerate([0, *firsts]):
        inside = ranks == rank
        levels.append(np.average(values[inside], weights=weight[inside]) if inside.any() else values[first])
    return thresholds, np.array(levels)


@pytest.mark.parametrize("shape", [(40_000,), (64, 512), (3, 5, 7, 4, 6, 2), (7,)])
@pytest.mark.parametrize("name", ["gelu", "tanh", "mish", "hardswish"])
def test_thresholds_and_levels_are_those_of_a_plain_computation(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    function = {**SMOOTH, **OTHERS}[name]
    scheme, x = scheme_of(function), torch.randn(shape, dtype=torch.float64)
    fitted = scheme.fit(x, in_dtype(function))
    thresholds, levels = reference(scheme, function, x)
    gray = [r ^ (r >> 1) for r in range(len(levels))]
    assert np.allclose(fitted.lower.numpy()[gray], [-np.inf, *thresholds], rtol=1e-12, atol=1e-15)
    assert np.allclose(fitted.levels.numpy()[gray], levels, rtol=1e-12, atol=1e-12)


def test_axes() -> None:
    axes = {name: scheme_of(function).axis for name, function in {**SMOOTH, **OTHERS}.items()}
    assert axes == {
        "gelu": Axis.SIDES,
        "silu": Axis.SIDES,
        "tanh": Axis.MAGNITUDE,
        "mish": Axis.X,
        "elu": Axis.X,
        "softplus": Axis.SIDES,
        "hardswish": Axis.DERIVATIVE,
        "selu": Axis.DERIVATIVE,
        "sin": Axis.DERIVATIVE,
        "sigmoid": Axis.MAGNITUDE,
        "softsign": Axis.MAGNITUDE,
    }


def test_a_codebook_stays_where_it_is_exact_and_for_many_bits() -> None:
    for function in (F.relu, F.leaky_relu, F.hardtanh, F.softshrink):
        assert isinstance(choose_scheme(array_derivative(function), 3), CodingScheme)
    assert isinstance(choose_scheme(array_derivative(F.gelu), 5), CodingScheme)


@pytest.mark.parametrize("name", [*SMOOTH, *OTHERS, "relu"])
def test_jumps_are_told_from_steep_rises(name: str) -> None:
    function = {**SMOOTH, **OTHERS, "relu": F.relu}[name]
    for scale in (1.0, 1e-3, 1e3):  # c * f(x / c) is as steep as c is small
        slope = array_derivative(lambda x, c=scale, f=function: c * f(x / c))
        x = sample_derivative(slope, Typical()).x
        assert has_jumps(slope, x) == (name in ("relu", "hardswish", "selu"))


def test_an_outlier_of_a_narrow_tensor_has_a_level_near_its_own_derivative() -> None:
    x = 0.01 * torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))
    x[5, 7], x[500, 100] = -15.0, 15.0  # a dead unit, say; in no sample
    coded = scheme_of(F.gelu).coded(x, in_dtype(F.gelu))
    assert abs(coded[5, 7]) < 0.1  # of 0
    assert abs(coded[500, 100] - 1) < 0.1


def test_what_is_not_finite_spoils_no_level() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    x[::2] = float("nan")
    x[1::4] = float("inf")
    fitted = scheme_of(F.gelu).fit(x, in_dtype(F.gelu))
    assert fitted.lower[1:].isfinite().all()
    assert fitted.levels.isfinite().all()


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from([*SMOOTH, *OTHERS]),
    shape=st.lists(st.integers(1, 40), min_size=0, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    bits=st.integers(1, 4),
    permuted=st.booleans(),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
)
def test_planes_hold_the_level_of_each_element(
    name: str, shape: list[int], dtype: torch.dtype, bits: int, permuted: bool, spread: float
) -> None:
    function = {**SMOOTH, **OTHERS}[name]
    scheme = scheme_of(function, bits)
    x = (spread * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    x = x.permute(tuple(reversed(range(x.dim())))) if permuted else x
    layout = plane_layout(x)
    saved = scheme.encode(x, in_dtype(function), layout)
    assert len(saved) == bits * layout.parts(x) + 1
    assert saved[-1].numel() == scheme.table_numel
    gradient = torch.ones(x.shape, dtype=at_least_float32(x).dtype)
    decoded = scheme.decode(gradient, saved, layout, gradient.dtype)
    assert torch.equal(decoded, scheme.coded(x, in_dtype(function)).to(gradient.dtype))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["gelu", "elu", "hardswish"])
def test_gradients_of_a_graph_are_those_of_the_levels_in_eager_pytorch(name: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    function = {**SMOOTH, **OTHERS}[name]
    model, x = mlp(Lambda(function), frozen=True), torch.randn(128, 32)
    model[0].weight.data *= 0.02  # where levels for typical x are 15 % off
    seen = watch(model, x, config=SAMPLED, dynamic=dynamic)
    (site,) = seen.coded
    assert (site.form, site.bits, site.levels) == ("codes", 3, ())
    levels = 4 if name == "gelu" else 8  # of GELU those of one side
    # Three planes of 128 x 64 bits, and levels in float32, in place of what GELU takes, in float32.
    assert (seen.plain.saved_bytes(), seen.chosen.saved_bytes()) == (
        x.nbytes + 128 * 64 * 4,
        x.nbytes + 128 * 64 * 3 // 8 + 4 * levels,
    )
    assert torch.allclose(seen.output, model(x), atol=1e-6)  # decomposed by Inductor, or by eager PyTorch
    found = gradients(model, seen.output.square().sum())
    h = model[0](x)
    factor = scheme_of(function).coded(h.detach(), in_dtype(function))
    entry = 2 * model(x).detach() @ model[2].weight
    exit_gradient = (entry * factor).float()
    for mine, theirs in zip(found, (exit_gradient.T @ x, exit_gradient.sum(0)), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_more_than_4_bits_and_exact_masks_save_no_levels() -> None:
    model, x = mlp(nn.ReLU(), frozen=True), torch.randn(128, 32)
    (site,) = watch(model, x, config=SAMPLED).coded
    assert site.form == "mask"
    many = FewBitConfig(recipe="derivatives", levels="sampled", bits=5, strict=True, min_numel=0)
    (site,) = watch(mlp(nn.GELU(), frozen=True), x, config=many).coded
    assert len(site.levels) == 32


def test_an_empty_tensor_has_no_sample() -> None:
    model = mlp(nn.GELU(), frozen=True)
    seen = watch(model, torch.randn(0, 32), config=SAMPLED, dynamic=False)
    seen.output.sum().backward()
    assert not model[0].weight.grad.any()
