"""Bit planes: what goes in comes out, in exactly b bits an element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit_fx.codec import BitPlanes, decode, encode, plane_layout
from fewbit_fx.levels import bits_for

LANES = (1, 32)


def evenly(bits: int, levels: int | None = None) -> tuple[float, ...]:
    count = levels or 2**bits
    return tuple(i / count for i in range(count))


def nearest(values: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    candidates = torch.tensor(levels, dtype=values.dtype)
    return candidates[(values.unsqueeze(-1) - candidates).abs().argmin(-1)]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=0, max_size=3),
    lanes=st.sampled_from(LANES),
    seed=st.integers(0, 1000),
)
def test_pack_then_unpack_gives_the_same_bits(shape: list[int], lanes: int, seed: int) -> None:
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    layout = BitPlanes(lanes)
    words = layout.pack(bits)
    assert torch.equal(layout.unpack(words, bits.shape) != 0, bits)
    assert words.dtype == torch.int32
    assert words.nbytes == layout.nbytes(bits) <= -(-bits.numel() // 8) + 4 * lanes


@pytest.mark.parametrize("lanes", LANES)
def test_exactly_one_bit_per_element_where_blocks_fill_up(lanes: int) -> None:
    assert BitPlanes(lanes).pack(torch.ones(64, 1024, dtype=torch.bool)).nbytes == 64 * 1024 // 8


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_gives_the_nearest_level(bits: int, lanes: int, dtype: torch.dtype) -> None:
    values, layout, levels = torch.rand(37, 29, dtype=dtype) * 1.4 - 0.2, BitPlanes(lanes), evenly(bits)
    planes = encode(values, levels, layout)
    assert len(planes) == bits
    assert torch.equal(decode(planes, levels, layout, values.shape, dtype), nearest(values, levels))


@pytest.mark.parametrize("count", [1, 3, 5, 6, 7])
def test_codebooks_need_not_be_full(count: int) -> None:
    values, layout, levels = torch.rand(100), BitPlanes(1), evenly(3, count)
    planes = encode(values, levels, layout)
    assert len(planes) == bits_for(levels)
    assert torch.equal(decode(planes, levels, layout, values.shape, values.dtype), nearest(values, levels))


def test_values_beyond_the_levels_and_not_numbers_have_codes_too() -> None:
    values, layout, levels = (
        torch.tensor([float("-inf"), -9.0, 9.0, float("inf"), float("nan")]),
        BitPlanes(1),
        evenly(2),
    )
    decoded = decode(encode(values, levels, layout), levels, layout, values.shape, values.dtype)
    assert decoded.tolist() == [0.0, 0.0, 0.75, 0.75, 0.0]


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(4, 8, 6, 6).to(memory_format=torch.channels_last),
        torch.rand(5, 7, 3).permute(2, 0, 1),
        torch.rand(6, 1).expand(6, 9),
        torch.rand(12, 12)[::2, ::3],
    ],
)
def test_any_strides_survive(x: torch.Tensor) -> None:
    layout, levels = plane_layout(x), evenly(3)
    decoded = decode(encode(x, levels, layout), levels, layout, x.shape, x.dtype)
    assert torch.equal(decoded, nearest(x, levels))


def test_the_layout_walks_memory_in_its_own_order() -> None:
    assert plane_layout(torch.rand(2, 3, 4, 5)).order == ()
    assert plane_layout(torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)).order == (0, 2, 3, 1)
