"""Encode and decode: a tensor's own values in a few bits, with one scale for each block of 32 elements.

A block is 32 neighbours in memory: mostly features of one token, whose magnitudes are alike. Its scale s is a multiple
of their largest magnitude m, in bfloat16: half a bit per element. Half of the codes stand for intervals of positive x,
half for negative ones, and the last code for 0. x is decoded to the middle of its interval. From 7 bits on, intervals
are equally wide, L = 2^(b-1) - 1 on either side of 0:

    s = m / (c L)               j = floor(x / s)                                x ~ (j + 1/2) s

Up to 6 bits, they get wider towards the largest element, by u(w) = (1 - a) w + a w^2, whose inverse is w:

    s = m (1 - a)^2 / (a c)     j = floor(L sign(x) w(c |x| / m))               x ~ sign(x) u(|j + 1/2| / L) m / c

where L is one more on the negative side, or else a code would be left over. The last is (v + v |v|) s with
v = (j + 1/2) a / ((1 - a) L). Codes are found with a polynomial for w, which is off by less than 0.001: a root takes a
processor longer. a = 0.4 and c = 0.985 are near the best of a grid at all of these bits, both for a normal block and
for one with heavy tails (Student's t with 4 degrees of freedom). With equal intervals c = 1 - 1/(4 L). It is below 1 so
that the largest element, and the rounding of s, is inside of the last interval, and above its middle or hardly below:
what is finite is decoded to what is finite, and masks of attention have the lowest number of a dtype.

With stochastic rounding, intervals are equally wide at all bits. Magnitudes are rounded up or down to the middle of an
interval, or to 0, at random, such that the mean over all seeds is x: c is a little smaller, so that nothing lies beyond
the last middle. Small numbers may then become 0.

Shares of a whole, such as probabilities, have levels and a rounding of their own (``shares``), of x / s. Those much
smaller than their block's largest become 0.

Zeros and, of all but shares, if rounded to the nearest, signs are exact: whatever compares x with 0 in the backward
decides as in the forward. (A number 1e35 times smaller than its block's largest may lose its sign.) In a block with an
infinity, all is infinite but zeros (of shares, but what becomes 0): a mask of 0 and -inf is exact. In a block with NaN,
all is NaN but zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit_fx.codec.bitplanes import WORD_BITS, PlaneLayout, arranged, plane_layout
from fewbit_fx.codec.dither import fixed, uniform
from fewbit_fx.codec.magnitudes import largest, within
from fewbit_fx.codec.packing import blocks_per_group, pack, packs_bytes, tensors_of_codes, unpack
from fewbit_fx.codec.shares import random_share_codes, random_shares_of, share_codes, shares_of, unit_of
from fewbit_fx.torch_private.inductor import keeps_rounding

SCALE_DTYPE = torch.bfloat16
CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # those whose range the scale has
_EVEN_BITS = 7  # from which on levels are equally far apart: as good then, and cheaper
_BEND = 0.4  # a of the module's text
_INVERSE = (-0.34760191, 1.00765211, -1.2867668, 1.62639235)  # w(u) is the sum of these times u^4, u^3, u^2 and u
_BENT_REACH = 0.985  # c where intervals differ
_BENT_UNIT = (1 - _BEND) ** 2 / _BEND  # u(w) is this times v + v^2
_SHRINK = 1 - 2**-8  # s / m of shares and at random: the largest numbers of float32 are above those of bfloat16
_STOCHASTIC_SHARE_REACH = _SHRINK * (1 - 2**-8)  # c for shares that are rounded at random: they are at most 1
_NEAR_MOST = 1 - 2**-5  # of a dtype's largest: the scale is at most that, where levels are above it
_EDGE = 0.25  # by how much less than L intervals the largest element is from 0 where they are equally wide
_LEAST = 1e-30  # blocks of smaller numbers are stored as if this were their largest: 1 / s stays finite
_LIFT = 2.0**8  # 1 / s of the largest numbers is subnormal, which a CPU may be told to take for 0; this times it is not


def encode_values(
    x: Tensor, bits: int, layout: PlaneLayout, seed: Tensor | None = None, shares: bool = False
) -> list[Tensor]:
    """The codes of a tensor.

    Args:
        x: A tensor of any shape, of one of ``CODED_DTYPES``.
        bits: Bits per element, 2 to 8.
        layout: The layout of its blocks, :func:`block_layout`.
        seed: For stochastic rounding (``dither.rounding_seed``); None rounds to the nearest.
        shares: Whether its elements are shares of a whole, or multiples of them, none of them negative.

    Returns:
        For each part of the layout the packed codes (``packing``), and then the scales, bfloat16 of shape
        (..., blocks of a group, 1).
    """
    saved = list[Tensor]()
    before, plain = 0, shares or seed is not None
    of_one = _scale_of_one(bits, plain)
    for part in layout.split(x):
        wide = _in_blocks(part).to(torch.float32)
        exact = (largest(wide) * of_one).clamp_min(_LEAST * of_one)
        if plain:
            exact = _limited(exact, x.dtype)
        scale = exact.to(SCALE_DTYPE)
        divisor = _divisor(_widened(scale, exact))
        dither = None if seed is None else _in_blocks(uniform(seed, x, part))
        if shares:
            codes = _share(wide, divisor, bits, before, dither)
        else:
            codes = _interval(wide, divisor, bits) if dither is None else _stochastic(wide, divisor, bits, dither)
        saved += [*pack(codes, bits), scale]
        before += math.prod(scale.shape)
    return saved


def _scale_of_one(bits: int, plain: bool) -> float:
    """The scale of a block whose largest magnitude is 1; plain is that itself, but for the range of its dtype."""
    if plain:
        return _SHRINK
    return 1 / (_zero(bits) - _EDGE) if bits >= _EVEN_BITS else _BENT_UNIT / _BENT_REACH


def _limited(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Small enough that the highest level, which may lie above the largest element, is finite in the dtype."""
    return torch.where(scale < float("inf"), scale.clamp_max(torch.finfo(dtype).max * _NEAR_MOST), scale)


def _share(blocks: Tensor, scale: Tensor, bits: int, before: int, dither: Tensor | None) -> Tensor:
    """The codes of shares, at random with a dither, else by the places of blocks that so many are before."""
    if dither is None:
        found = share_codes(blocks * (1 / scale), bits, fixed(blocks, unit_of(bits), before))
    else:
        found = random_share_codes(blocks * (_STOCHASTIC_SHARE_REACH / scale), bits, dither)
    return torch.where(blocks == 0, _zero(bits), found)


def _widened(scale: Tensor, exact: Tensor) -> Tensor:
    """The scale as it is stored, in float32: the codes are of it, not of what it was rounded from.

    Where Inductor leaves out the rounding, it is done on the bits of float32, of which bfloat16 has the upper half:
    half of its last digit is added, less a bit of the lower half where the digit is even.
    """
    if keeps_rounding():
        return scale.to(torch.float32)
    bits = exact.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


def _divisor(scale: Tensor) -> Tensor:
    """What elements are divided by: where they are infinite whatever their codes say, nothing that hides their sign."""
    return torch.where(scale < float("inf"), scale, 1.0)


def _in_blocks(part: Tensor) -> Tensor:
    """Groups of blocks, shape (..., blocks, 32), of a part of a layout, shape (..., 32, blocks)."""
    return part.reshape(*part.shape[:-2], part.shape[-1], part.shape[-2])


def _stochastic(blocks: Tensor, scale: Tensor, bits: int, dither: Tensor) -> Tensor:
    """The code of a value next to each element, at random."""
    place = blocks.abs() * (_stochastic_reach(bits) / scale)
    # Of middles k + 1/2, the one above place is taken with the probability place - (k + 1/2); below 1/2, it is that
    # of 0 and 1/2: 2 place.
    interval = (torch.minimum(place - 0.5, 2 * place - 1) + dither).floor().clamp_max(_zero(bits) - 1)
    return torch.where(interval < 0, _zero(bits), torch.where(blocks < 0, -1 - interval, interval))


def _interval(blocks: Tensor, scale: Tensor, bits: int) -> Tensor:
    found = _even_interval(blocks, scale, bits) if bits >= _EVEN_BITS else _bent_interval(blocks, scale, bits)
    return torch.where(blocks == 0, _zero(bits), found)


def _even_interval(blocks: Tensor, scale: Tensor, bits: int) -> Tensor:
    return within(blocks * (1 / scale), _zero(bits) * (1 - 2**-12)).floor()


def _bent_interval(blocks: Tensor, scale: Tensor, bits: int) -> Tensor:
    unit = _BENT_UNIT / _LIFT
    lifted = within(blocks * (1 / (scale * (1 / _LIFT))), (1 - 2**-8) / unit)
    size, (mean, half) = lifted.abs(), _mean_and_half(_zero(bits), _zero(bits) + 1)
    fourth, third, second, first = (mean * c * unit ** (4 - i) for i, c in enumerate(_INVERSE))
    place = lifted * (((fourth * size + third) * size + second) * size + first)
    return (place - place.abs() * (half / mean)).floor()


def _mean_and_half(of_positive: float, of_negative: float) -> tuple[float, float]:
    """m and h of m x - h |x|, which is x times one number where x is positive, and another where it is negative."""
    return (of_positive + of_negative) / 2, (of_negative - of_positive) / 2


def decode_values(
    saved: Sequence[Tensor],
    bits: int,
    layout: PlaneLayout,
    like: Tensor,
    stochastic: bool = False,
    shares: bool = False,
) -> Tensor:
    """The tensor that codes stand for.

    Args:
        saved: The result of :func:`encode_values`.
        bits: Bits per element.
        layout: The layout of the blocks.
        like: A tensor of the shape and dtype of what was encoded; only these are read.
        stochastic: Whether it was encoded with a seed.
        shares: As it was encoded.

    Returns:
        Tensor of that shape and dtype.
    """
    form = _Form(bits, like.dtype, stochastic, shares)
    if not packs_bytes(like.device):
        return arranged(_element_by_element(saved, form, layout, like), layout.order)
    each, before, parts = saved_per_part(bits), 0, list[Tensor]()
    for i in range(0, len(saved), each):
        *codes, scale = saved[i : i + each]
        parts.append(form.values(unpack(codes, bits, form.above_code), scale, form.offsets(scale, before)))
        before += math.prod(scale.shape)
    return layout.join(parts, like)


def _element_by_element(saved: Sequence[Tensor], form: _Form, layout: PlaneLayout, like: Tensor) -> Tensor:
    """All that is computed, in the dimensions of the elements: Inductor fuses only kernels that go through the same.

    Where one that goes block by block is too long for what reads it to compute it again, it has a kernel of its own.
    """

    def placed(blocks: Tensor) -> Tensor:
        return layout.in_memory([blocks], like)

    *codes, scale = saved
    each = scale.expand(*scale.shape[:-1], WORD_BITS)
    offsets = form.offsets(scale)
    placed_offsets = None if offsets is None else placed(offsets)
    return form.values(unpack(codes, form.bits, form.above_code, placed), placed(each), placed_offsets)


@dataclass(frozen=True)
class _Form:
    """What codes stand for; arguments as of :func:`decode_values`."""

    bits: int
    dtype: torch.dtype
    stochastic: bool
    shares: bool

    @property
    def above_code(self) -> float:
        """How much above its code a place is: the middle of an interval."""
        return 0.0 if self.shares else 0.5

    def offsets(self, scale: Tensor, before: int = 0) -> Tensor | None:
        """What shares were dithered by, for each element of the scale's blocks; None where nothing was."""
        return fixed(scale, unit_of(self.bits), before) if self.shares and not self.stochastic else None

    def values(self, place: Tensor, scale: Tensor, offsets: Tensor | None) -> Tensor:
        """The values of places, :attr:`above_code` their codes, with the scales of their blocks."""
        unit = scale.to(torch.float32)
        if offsets is not None:
            values = shares_of(place, self.bits, offsets) * unit
        elif self.shares:
            values = random_shares_of(place, self.bits) * (unit / _STOCHASTIC_SHARE_REACH)
        elif self.stochastic:
            values = place / _stochastic_reach(self.bits) * unit
        else:
            values = (place if self.bits >= _EVEN_BITS else _of_bent(place, self.bits)) * unit
        return torch.where(place == _zero(self.bits) + self.above_code, 0.0, values).to(self.dtype)


def _of_bent(place: Tensor, bits: int) -> Tensor:
    """v + v |v| of the module's text, of middles of intervals."""
    mean, half = _mean_and_half(_BEND / (1 - _BEND) / _zero(bits), _BEND / (1 - _BEND) / (_zero(bits) + 1))
    v = place * mean - place.abs() * half
    return v + v * v.abs()


def block_layout(x: Tensor, bits: int) -> PlaneLayout:
    """The layout of the blocks of a tensor of this device, shape and strides: each is 32 neighbours in memory.

    The lanes of the layout are the blocks of a group, which share bytes.
    """
    return plane_layout(x, lanes=(blocks_per_group(bits, x.device),))


def saved_per_part(bits: int) -> int:
    """How many tensors are saved for each part of a layout: the fields and the scales."""
    return tensors_of_codes(bits) + 1


def _zero(bits: int) -> float:
    """The code of 0, which is also L of the module's text."""
    return 2.0 ** (bits - 1) - 1


def _stochastic_reach(bits: int) -> float:
    """The place of the largest element among values: below the last one, whatever way the scale was rounded."""
    return (_zero(bits) - 0.5) * (1 - 2**-7) * _SHRINK


def scale_nbytes(x: Tensor, layout: PlaneLayout) -> int:
    """Bytes of the scales of a tensor, by hint where its size is symbolic."""
    return layout.nbytes(x) // torch.int32.itemsize * SCALE_DTYPE.itemsize
