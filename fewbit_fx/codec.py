"""Encode and decode: few-bit codes of a tensor as bit planes, in plain ATen operations.

A bit plane holds one bit of 32 elements in each int32 word, so b planes take exactly b bits an
element. A block of ``32 * lanes`` elements neighbouring in memory fills ``lanes`` words: element
``lane + lanes * shift`` of the block is bit ``shift`` of word ``lane``. One lane gives a GPU one
fused persistent reduction; 32 lanes let a CPU work on whole vectors.

The callers know planes only, never the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit_fx._torch import hint, statically_known_true
from fewbit_fx.levels import bits_for, boundaries_between

WORD_BITS = 32


@dataclass(frozen=True)
class BitPlanes:
    """The layout of a bit plane.

    Attributes:
        lanes: Words in a block, see the module's text.
        order: Dimensions of the tensor from the outermost to the innermost in memory, or empty for
            a contiguous tensor. Both directions then walk memory in its own order.
    """

    lanes: int
    order: tuple[int, ...] = ()

    def pack(self, bits: Tensor) -> Tensor:
        """Boolean tensor of any shape -> int32 words, shape (blocks, 1, lanes)."""
        flat = in_memory_order(bits, self.order).to(torch.int32)
        block = WORD_BITS * self.lanes
        if not statically_known_true(flat.numel() % block == 0):
            padding = -flat.numel() % block
            flat = torch.nn.functional.pad(flat.reshape(-1), (0, padding))
        shifted = flat.reshape(-1, WORD_BITS, self.lanes) << self._shifts(bits)
        # The size-1 dimension spares unpack a view of the words, which a partitioner could save instead.
        return shifted.sum(1, keepdim=True, dtype=torch.int32)

    def unpack(self, words: Tensor, shape: Sequence[int]) -> Tensor:
        """Words of :meth:`pack` -> int32 tensor of zeros and ones, of the shape that was packed."""
        flat = (words >> self._shifts(words)) & 1
        numel = math.prod(shape)
        if not statically_known_true(numel % (WORD_BITS * self.lanes) == 0):
            flat = flat.reshape(-1)[:numel]
        return from_memory_order(flat, shape, self.order)

    def nbytes(self, x: Tensor) -> int:
        """Bytes of one plane of a tensor, by hint where its size is symbolic."""
        block = WORD_BITS * self.lanes
        return -(-hint(x.numel()) // block) * block // 8

    @staticmethod
    def _shifts(like: Tensor) -> Tensor:
        return torch.arange(WORD_BITS, dtype=torch.int32, device=like.device).unsqueeze(-1)


def plane_layout(x: Tensor) -> BitPlanes:
    """The layout for planes of a tensor of this device, shape and strides."""
    return BitPlanes(lanes_on(x.device), memory_order(x))


def lanes_on(device: torch.device) -> int:
    """The number of lanes that suits a device."""
    return 32 if device.type == "cpu" else 1


def memory_order(x: Tensor) -> tuple[int, ...]:
    """Dimensions from the largest stride to the smallest, or () where that is their own order."""
    strides = x.stride()
    if not all(isinstance(n, int) for n in strides):
        return ()
    order = tuple(sorted(range(x.dim()), key=lambda d: -strides[d]))
    return () if order == tuple(range(x.dim())) else order


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def in_memory_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x with its dimensions in the order of :func:`memory_order`."""
    return x.permute(order) if order else x


def from_memory_order(flat: Tensor, shape: Sequence[int], order: tuple[int, ...]) -> Tensor:
    """The tensor of this shape whose elements, in that order, are ``flat``."""
    if not order:
        return flat.reshape(shape)
    return flat.reshape([shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])


def encode(values: Tensor, levels: tuple[float, ...], layout: BitPlanes) -> list[Tensor]:
    """Code each value by its nearest level: as many planes as the levels need bits, the most significant first.

    Bit by bit, each value is compared with the one boundary that its more significant bits have
    left in question: b comparisons, not 2^b - 1. NaN takes code 0.
    """
    count = bits_for(levels)
    boundaries = [*boundaries_between(levels), *[float("inf")] * (2**count - len(levels))]
    bits: list[Tensor] = []
    for position in range(count):
        step = 2 ** (count - position)
        candidates = boundaries[step // 2 - 1 :: step]
        thresholds = [torch.full((), c, dtype=values.dtype, device=values.device) for c in candidates]
        bits.append(values >= choose(thresholds, bits))
    return [layout.pack(bit) for bit in bits]


def decode(
    planes: Sequence[Tensor], levels: tuple[float, ...], layout: BitPlanes, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The level that each code names, in the given shape and floating point dtype."""
    bits = [layout.unpack(plane, shape) != 0 for plane in planes]
    return choose([torch.full((), c, dtype=dtype, device=planes[0].device) for c in padded(levels)], bits)


def multiply(gradient: Tensor, level: Tensor) -> Tensor:
    """``gradient * level``, and 0 where the level is 0, also for an infinite gradient, as torch's masks give it."""
    return torch.where(level == 0, 0.0, gradient * level)


def padded(levels: tuple[float, ...]) -> tuple[float, ...]:
    """A level for every code, those that are never used included."""
    return (*levels, *levels[-1:] * (2 ** bits_for(levels) - len(levels)))


def choose(candidates: Sequence[Tensor], bits: Sequence[Tensor]) -> Tensor:
    """The candidate (a scalar tensor) at the index spelled by ``bits``, the most significant bit first."""
    chosen = list(candidates)
    for bit in reversed(bits):
        chosen = [torch.where(bit, high, low) for low, high in zip(chosen[::2], chosen[1::2], strict=True)]
    return chosen[0]
