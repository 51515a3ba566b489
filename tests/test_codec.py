"""Bit planes and codes: what goes in comes out, in exactly b bits an element."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import derivative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit_fx.codebooks.activations import ACTIVATIONS, derivative_of
from fewbit_fx.codebooks.fitting import bits_for, gray_code
from fewbit_fx.codebooks.thresholds import Thresholds
from fewbit_fx.codec.bitplanes import PlaneLayout, bit_weights, plane_layout
from fewbit_fx.codec.encode_decode import bits_by_threshold, bits_by_value, by_code, decode_and_multiply, encode
from fewbit_fx.codec.scheme import fit_scheme

LANES = (1, 32)


def evenly(bits: int, levels: int | None = None) -> tuple[float, ...]:
    count = levels or 2**bits
    return tuple(i / count for i in range(count))


def nearest(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    candidates = torch.tensor(levels, dtype=values.dtype)
    return candidates[(values.unsqueeze(-1) - candidates).abs().argmin(-1)]


def there_and_back(values: Tensor, levels: tuple[float, ...], layout: PlaneLayout) -> Tensor:
    planes = encode(values, lambda blocks: bits_by_value(blocks, levels), layout)
    assert len(planes) == bits_for(levels) * layout.parts(values)
    assert sum(p.nbytes for p in planes) == bits_for(levels) * layout.nbytes(values)
    return decode_and_multiply(torch.ones_like(values), planes, levels, layout, values.dtype)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3),
    lanes=st.sampled_from((1, 8, 32)),
    seed=st.integers(0, 1000),
)
def test_pack_then_unpack_gives_the_same_bits(shape: list[int], lanes: int, seed: int) -> None:
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    layout = PlaneLayout(lanes)
    planes = encode(bits, lambda blocks: [blocks], layout)
    assert torch.equal(layout.join([layout.unpack(plane, bit_weights(bits.device)) for plane in planes], bits), bits)
    assert {p.dtype for p in planes} == {torch.int32}
    assert sum(p.nbytes for p in planes) == layout.nbytes(bits) <= -(-bits.numel() // 8) + 4 * lanes
    assert len(planes) == layout.parts(bits)


@pytest.mark.parametrize("lanes", LANES)
def test_exactly_one_bit_per_element_where_blocks_fill_up(lanes: int) -> None:
    (plane,) = encode(torch.ones(64, 1024, dtype=torch.bool), lambda blocks: [blocks], PlaneLayout(lanes))
    assert plane.nbytes == 64 * 1024 // 8


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_gives_the_nearest_level(bits: int, lanes: int, dtype: torch.dtype) -> None:
    values, levels = torch.rand(37, 29, dtype=dtype) * 1.4 - 0.2, evenly(bits)
    assert torch.equal(there_and_back(values, levels, PlaneLayout(lanes)), nearest(values, levels))


@pytest.mark.parametrize("count", [1, 3, 5, 6, 7])
def test_codebooks_need_not_be_full(count: int) -> None:
    values, levels = torch.rand(100), evenly(3, count)
    assert torch.equal(there_and_back(values, levels, PlaneLayout(1)), nearest(values, levels))


def test_values_beyond_the_levels_and_not_numbers_have_codes_too() -> None:
    values = torch.tensor([float("-inf"), -9.0, 9.0, float("inf"), float("nan")])
    assert there_and_back(values, evenly(2), PlaneLayout(1)).tolist() == [0.0, 0.0, 0.75, 0.75, 0.0]


def test_neighbouring_levels_differ_in_one_bit() -> None:
    levels = evenly(4)
    codes = [by_code(levels).index(level) for level in levels]
    assert codes == [gray_code(rank) for rank in range(16)]
    assert sorted(codes) == list(range(16))
    assert {(a ^ b).bit_count() for a, b in itertools.pairwise(codes)} == {1}


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(4, 8, 6, 6).to(memory_format=torch.channels_last),
        torch.rand(4, 32, 8, 8).to(memory_format=torch.channels_last),
        torch.rand(5, 7, 3).permute(2, 0, 1),
        torch.rand(6, 1).expand(6, 9),
        torch.rand(12, 12)[::2, ::3],
    ],
)
def test_any_strides_survive(x: Tensor) -> None:
    assert torch.equal(there_and_back(x, evenly(3), plane_layout(x)), nearest(x, evenly(3)))


def test_the_layout_walks_memory_in_its_own_order() -> None:
    assert plane_layout(torch.rand(2, 3, 4, 5)).order == ()
    assert plane_layout(torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)).order == (0, 2, 3, 1)


@pytest.mark.parametrize(
    ("shape", "lanes", "parts"),
    [((4, 1024), 32, 1), ((3, 512), 16, 1), ((5, 768), 32, 2), ((5, 257), 32, 2), ((3, 9), 32, 1)],
)
def test_the_lanes_are_those_that_leave_no_rest(shape: tuple[int, ...], lanes: int, parts: int) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16)
    assert (plane_layout(x).lanes, plane_layout(x).parts(x)) == (lanes, parts)


# Codes from x itself.

FUNCTIONS = {
    **{name: ACTIVATIONS[name] for name in ("gelu", "silu", "mish", "tanh", "softplus", "selu", "hardswish")},
    "elu, kinked": lambda x: F.elu(x, 1.7),
    "wide tanh": lambda x: 50 * torch.tanh(x / 50),
    "bump": lambda x: torch.exp(-x * x),
    "jump": lambda x: torch.where(x > 0.25, torch.tanh(x), 0.1 * x),
}


def codes(x: Tensor, thresholds: Thresholds) -> Tensor:
    bits = bits_by_threshold(x, thresholds)
    assert {b.dtype for b in bits} == {torch.int32 if x.dtype == torch.float32 else torch.bool}
    booleans = [b if b.dtype == torch.bool else b < 0 for b in bits]
    return sum(b.long() << i for i, b in enumerate(reversed(booleans)))  # type: ignore[return-value]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_thresholds_on_x_give_the_nearest_level(name: str, bits: int, dtype: torch.dtype) -> None:
    function = FUNCTIONS[name]
    scheme = fit_scheme(derivative_of(function), bits)
    assert scheme.thresholds is not None
    x = torch.cat(
        [torch.linspace(-300, 300, 100_001), torch.randn(100_000), torch.tensor([0.0, -0.0, -3.0, 3.0, 0.25])]
    )
    x = torch.cat([x, torch.tensor([-1e30, 1e30])]).to(dtype)
    table = torch.tensor(by_code(scheme.codebook.levels), dtype=torch.float64)
    exact, level = derivative(function, x), table[codes(x, scheme.thresholds)]
    best = nearest(exact, scheme.codebook.levels)
    assert ((level - exact).abs() <= (best - exact).abs() + 1e-6).all()


def test_flips_are_as_few_as_changes_of_level() -> None:
    """A level of a monotone derivative gives way to the next in one bit."""
    for bits in (1, 2, 3, 4):
        scheme = fit_scheme(derivative_of(F.softplus), bits)
        assert scheme.thresholds is not None
        flips = [len(flips) + 2 * len(magnitudes) for _, flips, magnitudes in scheme.thresholds.planes()]
        assert flips == [2**i for i in range(bits)]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x + torch.sin(x) ** 2, "periodic: no end of thresholds"),
        (F.relu6, "exact: not to be off by one float"),
        (lambda x: torch.where(x > 0.3, torch.tanh(x), 0.1 * x), "a jump where there is no float32"),
    ],
)
def test_where_codes_come_from_values(function, why: str) -> None:  # type: ignore[no-untyped-def]
    assert fit_scheme(derivative_of(function), 3).thresholds is None, why


def test_a_kink_at_zero_belongs_to_the_right_side() -> None:
    """Zeros are frequent (padding, dropout), and float64 has neighbours of 0 that float32 has not."""
    scheme = fit_scheme(derivative_of(lambda x: F.elu(x, 1.7)), 3)
    assert scheme.thresholds is not None
    assert 0.0 in scheme.thresholds.flips[-1]
    x = torch.tensor([0.0, -0.0, float(np.nextafter(np.float32(0), np.float32(1)))])
    level = torch.tensor(by_code(scheme.codebook.levels))[codes(x, scheme.thresholds)]
    assert (level[0] == level[1]) & (level[0] > 1.5) & (abs(level[2] - 1) < 0.1)
