"""Codes of several bits in memory, packed by the operations that a device is fast at.

On a CPU each code is first a byte, and four bytes are a word. A code of b bits is cut into fields whose widths divide
a byte, 6 = 4 + 2; a field of the same place in two blocks (4 bits) or four (2 bits) shares a byte. Masks and shifts
then work on four codes at a time. On a GPU the 32 elements of a block are the threads of a reduction, which also finds
the block's scale: each bit is a plane, a sum over the same 32. Codes of 8 bits are bytes on both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbit_fx.codec.bitplanes import bit_weights

_BYTE = 8
_EACH_BYTE = 0x01010101  # times a mask of 8 bits: the mask in each byte of a word


def packs_bytes(device: torch.device) -> bool:
    """Whether a device packs fields into bytes, and not bits into planes."""
    return device.type == "cpu"


def field_widths(bits: int, device: torch.device) -> tuple[int, ...]:
    """The widths of the fields of a code, the most significant first; they sum to ``bits``."""
    if bits == _BYTE:
        return (_BYTE,)
    return tuple(width for width in (4, 2, 1) if bits & width) if packs_bytes(device) else (1,) * bits


def blocks_per_group(bits: int, device: torch.device) -> int:
    """How many blocks share bytes."""
    return _BYTE // min(field_widths(bits, device)) if packs_bytes(device) else 1


def pack(codes: Tensor, bits: int) -> list[Tensor]:
    """Pack codes.

    Args:
        codes: Whole numbers from -2^(bits - 1) to 2^(bits - 1) - 1, float32 of shape (..., blocks of a group, 32): CPUs
            convert floats to bytes faster than integers.
        bits: Bits of a code.

    Returns:
        With 8 bits the codes, int8 of their shape. Else for each field int32 of shape (..., blocks * width / 8, 8), or
        for each plane int32 of shape (..., 1, 1).
    """
    if bits == _BYTE:
        return [codes.to(torch.int8)]
    from_zero = codes + 2.0 ** (bits - 1)
    if not packs_bytes(codes.device):
        return _planes(from_zero.to(torch.int32), bits)
    words = from_zero.to(torch.int8).view(torch.int32)
    return [_pack_field(words >> below, width) for width, below in _fields(bits)]


def unpack(packed: Sequence[Tensor], bits: int) -> Tensor:
    """The codes of :func:`pack`, float32 of their shape."""
    if bits == _BYTE:
        return packed[0].to(torch.float32)
    if not packs_bytes(packed[0].device):
        weights = bit_weights(packed[0].device).squeeze(-1)
        values = [
            torch.where((p & weights) != 0, 2.0**k, 0.0) for k, p in zip(reversed(range(bits)), packed, strict=True)
        ]
        return sum(values, torch.full((), -(2.0 ** (bits - 1)), device=weights.device))
    words = None
    for field, (width, below) in zip(packed, _fields(bits), strict=True):
        word = _unpack_field(field, width) << below
        words = word if words is None else words | word
    assert words is not None, "there is a field"
    return words.view(torch.int8).to(torch.float32) - 2.0 ** (bits - 1)


def _fields(bits: int) -> list[tuple[int, int]]:
    """The width of each field, and how many bits of the code lie below it."""
    widths = [width for width in (4, 2, 1) if bits & width]
    return [(width, sum(widths[i + 1 :])) for i, width in enumerate(widths)]


def _planes(codes: Tensor, bits: int) -> list[Tensor]:
    """The bits of int32 codes, the most significant first, each as a sum over the 32 elements of a block."""
    weights = bit_weights(codes.device).squeeze(-1)
    zero = torch.zeros_like(weights)
    return [
        torch.where((codes >> k) & 1 != 0, weights, zero).sum(-1, keepdim=True, dtype=torch.int32)
        for k in reversed(range(bits))
    ]


def _pack_field(words: Tensor, width: int) -> Tensor:
    """The lowest bits of each byte, those of as many blocks side by side as fit into one."""
    count, mask = _BYTE // width, (2**width - 1) * _EACH_BYTE
    rows = words.shape[-2] // count
    parts = [(words.narrow(-2, i * rows, rows) & mask) << (i * width) for i in range(count)]
    packed: Tensor = parts[0]
    for part in parts[1:]:
        packed = packed | part
    return packed


def _unpack_field(packed: Tensor, width: int) -> Tensor:
    mask = (2**width - 1) * _EACH_BYTE
    return torch.cat([(packed >> i) & mask for i in range(0, _BYTE, width)], -2)
