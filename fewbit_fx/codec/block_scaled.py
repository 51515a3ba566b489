"""Encode and decode: a tensor's own values in a few bits, with one scale for each block of 32 elements.

A block is 32 neighbours in memory: mostly features of one token, whose magnitudes are alike. Its scale s is their
largest magnitude, in bfloat16: half a bit per element. With b bits, codes are whole numbers from -L to L, where
L = 2^(b-1) - 1.

From 7 bits on, levels are equally far apart, and x is stored as the nearest but for its sign, which is exact:

    j = round(L x / s), or sign(x) where that is 0          x ~ j s / L

Up to 6 bits, x falls into one of L intervals on either side of 0, and is decoded to its middle:

    j = sign(x) * ceil(L w(c |x| / s))                      x ~ sign(j) u((|j| - 1/2) / L) s / c

where u(w) = (1 - a) w + a w^2 makes intervals wider towards the largest element, w is its inverse, and c < 1 keeps the
largest element inside of the last interval. a = 0.4 and c = 0.94 were the best of a grid, both for a normal block and
for one with heavy tails (Student's t with 4 degrees of freedom). There is one interval more on the negative side,
which no code is left for otherwise.

Zeros and signs are exact: whatever compares x with 0 in the backward decides as in the forward. A block of zeros
decodes to zeros. In a block with an infinity, all is infinite but zeros: a mask of 0 and -inf is exact. In a block with
NaN, all is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fewbit_fx.codec.bitplanes import PlaneLayout, plane_layout
from fewbit_fx.codec.packing import blocks_per_group, field_widths, pack, unpack

SCALE_DTYPE = torch.bfloat16
CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # those whose range the scale has
_EVEN_BITS = 7  # from which on levels are equally far apart: as good then, and cheaper
_BEND, _REACH = 0.4, 0.94  # a and c of the module's text
_LEAST_SCALE = 1e-30  # blocks of smaller numbers are stored as if this were their scale: 1 / s stays finite
_MOST_SCALE = torch.finfo(SCALE_DTYPE).max  # which some numbers of float32 are above


def encode_values(x: Tensor, bits: int, layout: PlaneLayout) -> list[Tensor]:
    """The codes of a tensor.

    Args:
        x: A tensor of any shape, of one of ``CODED_DTYPES``.
        bits: Bits per element, 2 to 8.
        layout: The layout of its blocks, :func:`block_layout`.

    Returns:
        For each part of the layout the packed codes (``packing``), and then the scales, bfloat16 of shape
        (..., blocks of a group, 1).
    """
    saved = []
    for part in layout.split(x):
        wide = _in_blocks(part).to(torch.float32)
        largest = wide.abs().amax(-1, keepdim=True)
        scale = torch.where(largest == math.inf, largest, largest.clamp_max(_MOST_SCALE)).to(SCALE_DTYPE)
        per_unit = 1 / scale.to(torch.float32).clamp(_LEAST_SCALE, _MOST_SCALE)
        codes = (_nearest if bits >= _EVEN_BITS else _interval)(wide, per_unit, _most(bits))
        saved += [*pack(codes, bits), scale]
    return saved


def _in_blocks(part: Tensor) -> Tensor:
    """Groups of blocks, shape (..., blocks, 32), of a part of a layout, shape (..., 32, blocks)."""
    return part.reshape(*part.shape[:-2], part.shape[-1], part.shape[-2])


def _nearest(blocks: Tensor, per_unit: Tensor, most: int) -> Tensor:
    nearest = (blocks * (per_unit * most)).round().clamp(-most, most)
    return torch.where(nearest == 0, torch.sign(blocks), nearest)


def _interval(blocks: Tensor, per_unit: Tensor, most: int) -> Tensor:
    magnitude = (blocks * (per_unit * _REACH)).abs().clamp_max(1.0)
    # w by the formula for roots that loses no digits to cancellation.
    share = 2 * magnitude / (1 - _BEND + ((1 - _BEND) ** 2 + 4 * _BEND * magnitude).sqrt())
    return torch.where(blocks < 0, (share * -(most + 1)).floor(), (share * most).ceil())


def decode_values(saved: Sequence[Tensor], bits: int, layout: PlaneLayout, like: Tensor) -> Tensor:
    """The tensor that codes stand for.

    Args:
        saved: The result of :func:`encode_values`.
        bits: Bits per element.
        layout: The layout of the blocks.
        like: A tensor of the shape and dtype of what was encoded; only these are read.

    Returns:
        Tensor of that shape and dtype.
    """
    each = saved_per_part(bits, like.device)
    parts = [_decoded(saved[i : i + each], bits).to(like.dtype) for i in range(0, len(saved), each)]
    return layout.join(parts, like)


def _decoded(saved: Sequence[Tensor], bits: int) -> Tensor:
    """One part, in blocks, float32."""
    *packed, scale = saved
    code = unpack(packed, bits)
    unit = scale.to(torch.float32).clamp_min(_LEAST_SCALE)
    values = (_of_nearest if bits >= _EVEN_BITS else _of_interval)(code, unit, _most(bits))
    zero = torch.where(unit == unit, 0.0, unit)  # beside an infinity zeros stay so; beside NaN, which has any code, not
    return torch.where(code == 0, zero, values)


def _of_nearest(code: Tensor, unit: Tensor, most: int) -> Tensor:
    return code * (unit * (1 / most))


def _of_interval(code: Tensor, unit: Tensor, most: int) -> Tensor:
    middle = code - 0.5 * torch.sign(code)
    share = middle * torch.where(code < 0, 1 / (most + 1), 1 / most)
    return (1 - _BEND + _BEND * share.abs()) * share * (unit * (1 / _REACH))


def block_layout(x: Tensor, bits: int) -> PlaneLayout:
    """The layout of the blocks of a tensor of this device, shape and strides: each is 32 neighbours in memory.

    The lanes of the layout are the blocks of a group, which share bytes.
    """
    return plane_layout(x, lanes=(blocks_per_group(bits, x.device),))


def saved_per_part(bits: int, device: torch.device) -> int:
    """How many tensors are saved for each part of a layout: the fields and the scales."""
    return len(field_widths(bits, device)) + 1


def _most(bits: int) -> int:
    """L of the module's text."""
    return (1 << (bits - 1)) - 1


def scale_nbytes(x: Tensor, layout: PlaneLayout) -> int:
    """Bytes of the scales of a tensor, by hint where its size is symbolic."""
    return layout.nbytes(x) // torch.int32.itemsize * SCALE_DTYPE.itemsize
