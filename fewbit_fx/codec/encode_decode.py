"""Encode and decode: few-bit codes of f'(x) as bit planes, in plain ATen operations.

The code of a level is the Gray code of its rank: neighbouring levels differ in one bit, so that along
the x axis each change of level flips a single bit of the code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fewbit_fx.codebooks.fitting import bits_for, boundaries_between, gray_code
from fewbit_fx.codebooks.thresholds import Thresholds
from fewbit_fx.codec.bitplanes import PlaneLayout, bit_weights
from fewbit_fx.codec.nonfinite import is_marked, mark, reserved_prefix

Level = TypeVar("Level", float, Tensor)
# From numbers to the bits of their codes, the most significant first: booleans, or the signs of int32.
BitsOf = Callable[[Tensor], list[Tensor]]


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def bits_by_value(values: Tensor, levels: tuple[float, ...]) -> list[Tensor]:
    """The bits of the code of the level nearest to each value of f'. NaN takes code 0, until it is marked.

    Each value is compared with the one boundary that the more significant bits of its level's rank have
    left in question: b comparisons, not 2^b - 1.
    """
    count = bits_for(levels)
    boundaries = [*boundaries_between(levels), *[float("inf")] * (2**count - len(levels))]
    rank: list[Tensor] = []
    for position in range(count):
        step = 2 ** (count - position)
        candidates = boundaries[step // 2 - 1 :: step]
        rank.append(values >= select([_scalar(c, values) for c in candidates], rank))
    return [rank[0], *(torch.bitwise_xor(rank[i], rank[i + 1]) for i in range(count - 1))]


def bits_by_threshold(x: Tensor, thresholds: Thresholds, compiled: bool = True) -> list[Tensor]:
    """The bits of the codes of f'(x) from x itself: each bit flips at thresholds of its own.

    Compiled for a CPU, in float32, a bit is the sign of an int32: three quarters of the time that masks take,
    which Inductor makes vectors and masks again at each step. In other dtypes it does not vectorise that,
    and vmap of torch 2.11 does not know the view.
    """
    signs = takes_signs(x, compiled)
    wide = at_least_float32(x)
    magnitude = wide.abs()
    bits = []
    for start, flips, magnitudes in thresholds.planes():
        pairs = [(wide, _scalar(t, wide)) for t in flips] + [(magnitude, _scalar(t, wide)) for t in magnitudes]
        bits.append(flipping(x, pairs, signs, start))
    return bits


def takes_signs(x: Tensor, compiled: bool) -> bool:
    """Whether bits of x are rather signs of int32 than booleans: see :func:`bits_by_threshold`."""
    return compiled and x.device.type == "cpu" and x.dtype == torch.float32


def flipping(x: Tensor, flips: Sequence[tuple[Tensor, Tensor]], signs: bool, start: bool = False) -> Tensor:
    """A bit that flips once for each pair of a tensor and a scalar tensor of its dtype that it is above.

    Args:
        x: What the bits are of.
        flips: The pairs.
        signs: Whether to answer by the signs of int32.
        start: The bit where nothing flips.
    """
    if not flips:
        return torch.full_like(x, start, dtype=torch.bool)
    if signs:
        bit = functools.reduce(torch.bitwise_xor, [(t - v).view(torch.int32) for v, t in flips])
        return torch.bitwise_not(bit) if start else bit
    # The opposite comparison instead of a bitwise_not behind it, which costs a pass over the vector.
    compare = [torch.le if start and i == 0 else torch.gt for i in range(len(flips))]
    return functools.reduce(torch.bitwise_xor, [c(v, t) for c, (v, t) in zip(compare, flips, strict=True)])


def bits_of_rank(x: Tensor, compared: Tensor, thresholds: Sequence[Tensor], signs: bool) -> list[Tensor]:
    """The bits of the Gray code of how many thresholds a tensor is above, the most significant first.

    Args:
        x: What the bits are of.
        compared: What is compared.
        thresholds: Ascending, 2^b - 1 tensors of the dtype of ``compared``, scalars or one number for each element.
        signs: Whether to answer by the signs of int32.
    """
    bits, step = [], len(thresholds) + 1
    while step > 1:  # each bit flips at every other of the thresholds at which none before it does
        bits.append(flipping(x, [(compared, t) for t in thresholds[step // 2 - 1 :: step]], signs))
        step //= 2
    return bits


def encode(
    x: Tensor, bits_of: BitsOf, layout: PlaneLayout, guarded: bool = False, mirrored: bool = False
) -> list[Tensor]:
    """The planes of the codes of a tensor: for each part of the layout as many as a code has bits.

    Args:
        x: Tensor of any shape and dtype.
        bits_of: Takes blocks of x, shape (..., 32, lanes), and returns as many blocks of bits as a code has.
        layout: The layout of the planes of this tensor.
        guarded: Whether the last bits say what is finite (``codec/nonfinite.py``).
        mirrored: Whether half of the levels follow from the others (``fitting.is_mirrored``).
    """
    weights = bit_weights(x.device)
    planes = []
    for part in layout.split(x):
        words = [layout.pack(bit, weights) for bit in bits_of(part)]
        planes += marked_words(words, part, mirrored) if guarded else words
    return planes


def marked_words(words: Sequence[Tensor], blocks: Tensor, mirrored: bool) -> list[Tensor]:
    """The planes to save of one part, with words marked. The first bit of mirrored levels stays as it is.

    Args:
        words: The words of each bit, the most significant first, then those of what is finite.
        blocks: The part that was encoded, shape (..., 32, lanes).
        mirrored: Whether half of the levels follow from the others.
    """
    free = 1 if mirrored else 0
    return [*words[:free], *mark(words[free:], blocks)]


def decode_and_multiply(
    gradient: Tensor,
    planes: Sequence[Tensor],
    levels: tuple[float, ...] | list[Tensor],
    layout: PlaneLayout,
    dtype: torch.dtype,
    product: Callable[[Tensor, Tensor], Tensor] = torch.mul,
    guarded: bool = False,
    mirrored: bool = False,
) -> Tensor:
    """``gradient * level``, with the levels that the codes name.

    From the bits on in the gradient's own shape, that of the loops around it, for what Inductor puts into
    a buffer in between has to be in the same loop. Only what is in two parts is multiplied part by part,
    so that no copy is made of the levels.

    Args:
        gradient: A tensor of the shape of what was encoded.
        planes: The result of :func:`encode`.
        levels: The levels of the codebook, in ascending order; or as scalar tensors, that of each code.
        layout: The layout that the planes were encoded with.
        dtype: The dtype of the result. The product is taken in float32, or in float64 where the gradient is.
        product: What multiplies the gradient by the level, in place of the plain product.
        guarded, mirrored: The same as for :func:`encode`.
    """

    wide = at_least_float32(gradient)
    if isinstance(levels, list):
        table = [level.to(wide.dtype) for level in levels]
    else:
        table = [_scalar(level, wide) for level in by_code(levels)]

    def scaled(g: Tensor, bits: Sequence[Tensor]) -> Tensor:
        return product(g, select_level(table, bits, guarded, mirrored)).to(dtype)

    count = (len(table) - 1).bit_length()
    parts = [unpack(planes[i : i + count], layout, guarded) for i in range(0, len(planes), count)]
    if len(parts) == 1:
        return scaled(wide, [layout.join([bit], gradient) for bit in parts[0]])
    return layout.join([scaled(g, bits) for g, bits in zip(layout.split(wide), parts, strict=True)], gradient)


def unpack(planes: Sequence[Tensor], layout: PlaneLayout, guarded: bool) -> list[Tensor]:
    """The bits of the codes of one part, and behind them, where guarded, which words are marked.

    Args:
        planes: The planes of the part, the most significant first.
        layout: The layout that the planes were encoded with.
        guarded: Whether some words may be marked.
    """
    weights = bit_weights(planes[0].device)
    bits = [layout.unpack(plane, weights) for plane in planes]
    return [*bits, layout.spread(is_marked(planes[-1]))] if guarded else bits


def by_code(levels: tuple[Level, ...]) -> tuple[Level, ...]:
    """A level for every code, those that are never used included."""
    ranks = {gray_code(rank): rank for rank in range(2 ** bits_for(levels))}
    return tuple(levels[min(ranks[code], len(levels) - 1)] for code in range(len(ranks)))


def multiply(gradient: Tensor, level: Tensor) -> Tensor:
    """``gradient * level``, and 0 where the level is 0, also for an infinite gradient, as torch's masks give it."""
    return torch.where(level == 0, 0.0, gradient * level)


def select_level(table: Sequence[Tensor], bits: Sequence[Tensor], guarded: bool, mirrored: bool = False) -> Tensor:
    """The level of each code.

    Args:
        table: The result of :func:`by_code`, as scalar tensors.
        bits: The result of :func:`unpack`.
        guarded, mirrored: The same as for :func:`encode`.
    """
    if mirrored:
        half = len(table) // 2
        level = select_level(table[:half], bits[1:], guarded)
        return torch.where(bits[0], table[0] + table[half] - level, level)
    if not guarded:
        return select(table, bits)
    *prefix, last, marked = bits
    candidates = _halved(table, last)
    reserved = sum(bit << i for i, bit in enumerate(reversed(reserved_prefix(len(prefix) + 1))))
    candidates[reserved] = torch.where(marked, float("nan"), candidates[reserved])
    return select(candidates, prefix)


def select(candidates: Sequence[Tensor], bits: Sequence[Tensor]) -> Tensor:
    """The candidate (a scalar tensor) at the index spelled by ``bits``, the most significant bit first."""
    chosen = list(candidates)
    for bit in reversed(bits):
        chosen = _halved(chosen, bit)
    return chosen[0]


def _halved(candidates: Sequence[Tensor], bit: Tensor) -> list[Tensor]:
    """Halve a list of candidates: of each pair, ``bit`` chooses the second."""
    return [torch.where(bit, high, low) for low, high in zip(candidates[::2], candidates[1::2], strict=True)]


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)
