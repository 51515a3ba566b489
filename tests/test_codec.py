"""Bit planes: what goes in comes out, in exactly b bits an element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit_fx.codebook import Codebook
from fewbit_fx.codec import BitPlanes, decode, encode, plane_layout

LANES = (1, 32)


def codebook(bits: int, levels: int | None = None) -> Codebook:
    count = levels or 2**bits
    return Codebook(tuple(i / count for i in range(count)), 0.0)


def nearest(values: torch.Tensor, book: Codebook) -> torch.Tensor:
    levels = torch.tensor(book.levels, dtype=values.dtype)
    return levels[(values.unsqueeze(-1) - levels).abs().argmin(-1)]


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
    values, layout, book = torch.rand(37, 29, dtype=dtype) * 1.4 - 0.2, BitPlanes(lanes), codebook(bits)
    planes = encode(values, book, layout)
    assert len(planes) == bits
    assert torch.equal(decode(planes, book, layout, values.shape, dtype), nearest(values, book))


@pytest.mark.parametrize("levels", [1, 3, 5, 6, 7])
def test_codebooks_need_not_be_full(levels: int) -> None:
    values, layout, book = torch.rand(100), BitPlanes(1), codebook(3, levels)
    planes = encode(values, book, layout)
    assert len(planes) == book.bits
    assert torch.equal(decode(planes, book, layout, values.shape, values.dtype), nearest(values, book))


def test_values_beyond_the_levels_and_not_numbers_have_codes_too() -> None:
    values, layout, book = (
        torch.tensor([float("-inf"), -9.0, 9.0, float("inf"), float("nan")]),
        BitPlanes(1),
        codebook(2),
    )
    decoded = decode(encode(values, book, layout), book, layout, values.shape, values.dtype)
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
    layout, book = plane_layout(x), codebook(3)
    decoded = decode(encode(x, book, layout), book, layout, x.shape, x.dtype)
    assert torch.equal(decoded, nearest(x, book))


def test_the_layout_walks_memory_in_its_own_order() -> None:
    assert plane_layout(torch.rand(2, 3, 4, 5)).order == ()
    assert plane_layout(torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)).order == (0, 2, 3, 1)
