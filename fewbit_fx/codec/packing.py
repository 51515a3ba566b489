"""Codes of several bits in memory, packed by the operations that a device is fast at.

A code of b bits is cut into fields whose widths divide a byte, 6 = 4 + 2. On a CPU each code is first a byte, and four
bytes are a word; a field of the same place in two blocks (4 bits) or four (2 bits) shares a byte. Masks and shifts then
work on four codes at a time. On a GPU the 32 elements of a block are reduced together, which also finds the block's
scale: a field of 4 bits of eight neighbours is a word of 32 bits, the sum of the shifted fields, so that the block has
four words of it, side by side. Codes of 8 bits are bytes on both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewbit_fx.codec.bitplanes import WORD_BITS
from fewbit_fx.torch_private.sizes import sizes_of, statically_known_true

Placed = Callable[[Tensor], Tensor]

_BYTE = 8
_PAST_INT32 = 2**31
_EACH_BYTE = 0x01010101  # times a mask of 8 bits: the mask in each byte of a word


def packs_bytes(device: torch.device) -> bool:
    """Whether a device packs fields of several blocks into bytes, and not those of one into words."""
    return device.type == "cpu"


def tensors_of_codes(bits: int) -> int:
    """How many tensors hold the codes of as many bits."""
    return len(_fields(bits))


def blocks_per_group(bits: int, device: torch.device) -> int:
    """How many blocks share bytes."""
    return _BYTE // min(width for width, _ in _fields(bits)) if packs_bytes(device) else 1


def pack(codes: Tensor, bits: int) -> list[Tensor]:
    """Pack codes.

    Args:
        codes: Whole numbers from -2^(bits - 1) to 2^(bits - 1) - 1, float32 of shape (..., blocks of a group, 32): CPUs
            convert floats to bytes faster than integers.
        bits: Bits of a code.

    Returns:
        With 8 bits the codes, int8 of their shape. Else for each field one tensor, int32 of shape
        (..., blocks * width / 8, 8), or, where a block has words of its own, (kept dimensions, words), block by block.
    """
    if bits == _BYTE:
        return [codes.to(torch.int8)]
    if packs_bytes(codes.device):
        words = (codes + 2.0 ** (bits - 1)).to(torch.int8).view(torch.int32)
        return [_pack_field(_shifted_right(words, below), width) for width, below in _fields(bits)]
    whole = codes.to(torch.int32) + 2 ** (bits - 1)  # in this order rounding down is part of the conversion
    return [_words_of_block(_shifted_right(whole, below), width) for width, below in _fields(bits)]


def unpack(packed: Sequence[Tensor], bits: int, above: float = 0.0, placed: Placed | None = None) -> Tensor:
    """The codes of :func:`pack`, and so much above them, float32.

    Args:
        packed: Their fields.
        bits: Bits of a code.
        above: What is added to each.
        placed: Needed where blocks do not share bytes. Gives what has the elements in their order, in whatever shape,
            the shape of the result. All is computed in that: Inductor's kernels fuse with those of readers if they go
            through the same dimensions.
    """
    if placed is None:
        assert packs_bytes(packed[0].device) or bits == _BYTE, "words are of elements, wherever these lie"
        placed = _as_they_are
    if bits == _BYTE:
        codes = placed(packed[0]).to(torch.float32)
        return codes + above if above else codes
    widths = [width for width, _ in _fields(bits)]
    if packs_bytes(packed[0].device):
        fields = [_unpack_field(field, width) for field, width in zip(packed, widths, strict=True)]
    else:
        fields = [_fields_of_block(words, width, placed) for words, width in zip(packed, widths, strict=True)]
    whole = fields[-1]
    for field, (_, below) in zip(fields[:-1], _fields(bits), strict=False):
        whole = whole | (field << below)
    codes = whole.view(torch.int8) if packs_bytes(packed[0].device) else whole
    return codes.to(torch.float32) - (2.0 ** (bits - 1) - above)


def _as_they_are(blocks: Tensor) -> Tensor:
    return blocks


def _fields(bits: int) -> list[tuple[int, int]]:
    """The width of each field, the most significant first, and how many bits of the code lie below it."""
    widths = [width for width in (_BYTE, 4, 2, 1) if bits & width]
    return [(width, sum(widths[i + 1 :])) for i, width in enumerate(widths)]


def _shifted_right(codes: Tensor, by: int) -> Tensor:
    return codes >> by if by else codes


def _words_of_block(codes: Tensor, width: int) -> Tensor:
    """The lowest bits of int32 codes: so many neighbours as fit share a word, ``width`` words are of a block.

    All are sums over the whole block, which a GPU's kernel has in one loop. They are in a row then, for the word of an
    element is found by one division of its number.
    """
    number, in_a_word = torch.arange(WORD_BITS, dtype=torch.int32, device=codes.device), WORD_BITS // width
    shifted = (codes & (2**width - 1)) << (number % in_a_word * width)
    word = number // in_a_word
    zero = torch.zeros((), dtype=torch.int32, device=codes.device)
    words = [torch.where(word == i, shifted, zero).sum(-1, keepdim=True, dtype=torch.int32) for i in range(width)]
    return torch.cat(words, -1).flatten(-3)


def _fields_of_block(words: Tensor, width: int, placed: Placed) -> Tensor:
    """The fields of :func:`_words_of_block`, placed."""
    own = placed(words.unsqueeze(-1).expand(*words.shape, WORD_BITS // width))
    field: Tensor = (own >> _shifts(words, width, placed)) & (2**width - 1)
    return field


def _shifts(words: Tensor, width: int, placed: Placed) -> Tensor:
    """By how much the word of each element is shifted, placed.

    A multiple, modulo 32, of the element's number in the whole tensor, which a kernel's loops count. Its number in its
    block is a remainder of that in a row: such were three quarters of a decode's instructions. Over kept dimensions
    numbers start anew.
    """
    *kept, count = sizes_of(words)
    numel = count * (WORD_BITS // width)
    dtype = torch.int32 if statically_known_true(numel * width < _PAST_INT32) else torch.int64
    number = torch.arange(numel, dtype=dtype, device=words.device).expand(*kept, numel)
    return ((placed(number) * width) & (WORD_BITS - 1)).to(torch.int32)


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
