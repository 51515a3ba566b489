"""Codes of several bits in memory, packed by the operations that a device is fast at.

A code of b bits is cut into fields whose widths divide a byte, 6 = 4 + 2. On a CPU each code is first a byte, and four
bytes are a word; a field of the same place in two blocks (4 bits) or four (2 bits) shares a byte. Masks and shifts then
work on four codes at a time. On a GPU the 32 elements of a block are reduced together, which also finds the block's
scale: a field of 4 bits of eight neighbours is a word of 32 bits, the sum of the shifted fields, so that the block has
four words of it. Codes of 8 bits are bytes on both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbit_fx.codec.bitplanes import WORD_BITS

_BYTE = 8
_EACH_BYTE = 0x01010101  # times a mask of 8 bits: the mask in each byte of a word


def packs_bytes(device: torch.device) -> bool:
    """Whether a device packs fields of several blocks into bytes, and not those of one into words."""
    return device.type == "cpu"


def field_widths(bits: int) -> tuple[int, ...]:
    """The widths of the fields of a code, the most significant first; they sum to ``bits``."""
    return (_BYTE,) if bits == _BYTE else tuple(width for width in (4, 2, 1) if bits & width)


def blocks_per_group(bits: int, device: torch.device) -> int:
    """How many blocks share bytes."""
    return _BYTE // min(field_widths(bits)) if packs_bytes(device) else 1


def pack(codes: Tensor, bits: int) -> list[Tensor]:
    """Pack codes.

    Args:
        codes: Whole numbers from -2^(bits - 1) to 2^(bits - 1) - 1, float32 of shape (..., blocks of a group, 32): CPUs
            convert floats to bytes faster than integers.
        bits: Bits of a code.

    Returns:
        With 8 bits the codes, int8 of their shape. Else for each field int32 of shape (..., blocks * width / 8, 8), or,
        where a block has words of its own, (..., blocks, width).
    """
    if bits == _BYTE:
        return [codes.to(torch.int8)]
    from_zero = codes + 2.0 ** (bits - 1)
    if not packs_bytes(codes.device):
        whole = from_zero.to(torch.int32)
        return [_words_of_block(whole >> below if below else whole, width) for width, below in _fields(bits)]
    words = from_zero.to(torch.int8).view(torch.int32)
    return [_pack_field(words >> below, width) for width, below in _fields(bits)]


def unpack(packed: Sequence[Tensor], bits: int) -> Tensor:
    """The codes of :func:`pack`, float32 of their shape."""
    if bits == _BYTE:
        return packed[0].to(torch.float32)
    in_bytes = packs_bytes(packed[0].device)
    unpack_field = _unpack_field if in_bytes else _fields_of_block
    words = None
    for field, (width, below) in zip(packed, _fields(bits), strict=True):
        word = unpack_field(field, width)
        word = word << below if below else word
        words = word if words is None else words | word
    assert words is not None, "there is a field"
    return (words.view(torch.int8) if in_bytes else words).to(torch.float32) - 2.0 ** (bits - 1)


def _fields(bits: int) -> list[tuple[int, int]]:
    """The width of each field, and how many bits of the code lie below it."""
    widths = field_widths(bits)
    return [(width, sum(widths[i + 1 :])) for i, width in enumerate(widths)]


def _words_of_block(codes: Tensor, width: int) -> Tensor:
    """The lowest bits of the int32 codes of a block, (..., 32) -> (..., width): so many neighbours as fit share a word.

    All are sums over the whole block, which a GPU's kernel has in one loop.
    """
    place, word = _places(width, codes.device)
    shifted = (codes & (2**width - 1)) << place
    zero = torch.zeros((), dtype=torch.int32, device=codes.device)
    sums = [torch.where(word == i, shifted, zero).sum(-1, keepdim=True, dtype=torch.int32) for i in range(width)]
    return torch.cat(sums, -1)


def _fields_of_block(words: Tensor, width: int) -> Tensor:
    """The fields of :func:`_words_of_block`, (..., width) -> (..., 32)."""
    place, _ = _places(width, words.device)
    each = words.unsqueeze(-1).expand(*words.shape, WORD_BITS // width).reshape(*words.shape[:-1], WORD_BITS)
    return (each >> place) & (2**width - 1)


def _places(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each element of a block: how far its field is shifted, and in which word of the block it is."""
    number = torch.arange(WORD_BITS, dtype=torch.int32, device=device)
    in_a_word = WORD_BITS // width
    return (number % in_a_word) * width, number // in_a_word


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
