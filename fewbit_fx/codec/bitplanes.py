"""Bit planes: one bit of each of 32 elements in an int32 word, so that b planes take exactly b bits an element.

A block of ``32 * lanes`` elements neighbouring in memory fills ``lanes`` words: element
``lane + lanes * i`` of the block is bit i of word ``lane``. One lane gives a GPU one fused persistent
reduction; on a CPU as many as fill a cache line with elements make plain loops over whole vectors.

Whoever has planes knows neither lanes nor blocks; whoever makes them works block by block, in tensors
of shape (..., 32, lanes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbit_fx.torch_private.sizes import hint, sizes_of, statically_known_true

WORD_BITS = 32


@dataclass(frozen=True)
class PlaneLayout:
    """The layout of the planes of a tensor.

    Attributes:
        lanes: Words in a block, see the module's text.
        order: Dimensions of the tensor from the outermost to the innermost in memory, or empty for
            a contiguous tensor. Both directions then walk memory in its own order.
        kept: So many dimensions stay in front of the blocks, those of symbolic size among them: the ones
            behind fill blocks. Inductor cannot see through a view that merges a symbolic size.
    """

    lanes: int
    order: tuple[int, ...] = ()
    kept: int = 0

    def split(self, x: Tensor) -> list[Tensor]:
        """The elements of a tensor, in its order in memory, as blocks: one part, or two.

        Where the last block is not known to be full, it is padded. With several lanes it is then a
        part of its own, so that all others remain plain vector loops.
        """
        ordered = in_memory_order(x, self.order)
        if self._fills(x):
            return [self.blocks(ordered)]
        flat = ordered.reshape(-1)
        if not self._has_rest_apart(x):
            return [self.blocks(pad(flat, (0, -flat.numel() % self._block)))]
        whole = (flat.numel() - 1) // self._block * self._block  # so that the rest is never empty: no case apart
        rest = pad(flat[whole:], (0, self._block - (flat.numel() - whole)))
        return [self.blocks(flat[:whole]), self.blocks(rest)]

    def parts(self, x: Tensor) -> int:
        """How many parts :meth:`split` makes."""
        return 2 if self._has_rest_apart(x) else 1

    def has_an_empty_part(self, x: Tensor) -> bool:
        """Whether all elements are in the last of two parts, at the size at which a symbolic one was first seen.

        Inductor does not lower a view of an empty tensor of symbolic size.
        """
        return self._has_rest_apart(x) and hint(_numel(x)) <= self._block

    def join(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The tensor, of the shape of another, whose parts these are."""
        return arranged(self.in_memory(parts, like), self.order)

    def in_memory(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The same with its dimensions as they lie in memory: before :func:`arranged`."""
        shape = sizes_in_memory(sizes_of(like), self.order)
        if self._fills(like):
            return self._unkept_in_a_row(parts[0]).reshape(shape)
        flats = [part.reshape(-1) for part in parts]
        numel = _numel(like)
        flats[-1] = flats[-1][: numel - sum(flat.numel() for flat in flats[:-1])]
        return (torch.cat(flats) if len(flats) > 1 else flats[0]).reshape(shape)

    def blocks(self, x: Tensor) -> Tensor:
        """Whole blocks, shape (kept dimensions, blocks, 32, lanes), of a tensor in memory order."""
        x = self._unkept_in_a_row(x)
        return x.reshape(*x.shape[: self.kept], -1, WORD_BITS, self.lanes)

    def _unkept_in_a_row(self, x: Tensor) -> Tensor:
        """The elements in a row, where sizes are symbols and no dimension is kept.

        A reshape of several dimensions to several asks which of them go together, and torch guards on the answer: a
        size that differs from call to call would be a number from then on.
        """
        in_place = self.kept or all(isinstance(size, int) for size in sizes_of(x))
        return x if in_place else x.reshape(-1)

    def pack(self, bits: Tensor, weights: Tensor) -> Tensor:
        """Blocks of bits, boolean or the signs of int32 -> int32 words, shape (kept dimensions, blocks, 1, lanes).

        Args:
            bits: The bits of one plane, shape (..., 32, lanes).
            weights: The result of :func:`bit_weights`.
        """
        if bits.dtype == torch.bool:
            weighted = torch.where(bits, weights, torch.zeros_like(weights))
        else:
            weighted = (bits >> (WORD_BITS - 1)) & weights
        # The size-1 dimension spares unpack a view of the words, which a partitioner could save instead.
        return weighted.sum(-2, keepdim=True, dtype=torch.int32)

    def unpack(self, words: Tensor, weights: Tensor) -> Tensor:
        """Words of :meth:`pack`, and the same weights -> the boolean blocks."""
        return (words & weights) != 0

    def spread(self, words: Tensor) -> Tensor:
        """Repeat a value of each word for the 32 elements of the word: (..., 1, lanes) -> (..., 32, lanes)."""
        return words.expand(*words.shape[:-2], WORD_BITS, self.lanes)

    def nbytes(self, x: Tensor) -> int:
        """Bytes of one plane of a tensor, by hint where its size is symbolic."""
        return -(-hint(_numel(x)) // self._block) * self._block // 8

    @property
    def _block(self) -> int:
        return WORD_BITS * self.lanes

    def _fills(self, x: Tensor) -> bool:
        return self.kept > 0 or statically_known_true(_numel(x) % self._block == 0)

    def _has_rest_apart(self, x: Tensor) -> bool:
        return self.lanes > 1 and not self._fills(x) and not statically_known_true(_numel(x) < self._block)


def bit_weights(device: torch.device) -> Tensor:
    """2^i for the 32 bits of a word, shape (32, 1)."""
    one = torch.ones((), dtype=torch.int32, device=device)
    return (one << torch.arange(WORD_BITS, dtype=torch.int32, device=device)).unsqueeze(-1)


def plane_layout(x: Tensor, lanes: tuple[int, ...] = ()) -> PlaneLayout:
    """The layout for planes of a tensor of this device, shape and strides.

    Args:
        x: The tensor.
        lanes: The numbers of lanes to choose from, the best first; by default those that suit the device and dtype.
    """
    order = memory_order(x)
    own: list[Any] = sizes_of(x)
    sizes = [own[d] for d in order] if order else own
    kept = 0
    for i, size in enumerate(sizes):  # a plain loop, which Dynamo traces
        if not isinstance(size, int):
            kept = i + 1
    inner = math.prod(sizes[kept:])
    suitable = lanes or lanes_for(x.device, x.dtype)
    filling = [n for n in suitable if inner % (WORD_BITS * n) == 0]
    return PlaneLayout(filling[0], order, kept) if filling else PlaneLayout(suitable[0], order)


def lanes_for(device: torch.device, dtype: torch.dtype) -> tuple[int, ...]:
    """The numbers of lanes that suit tensors of a device and dtype, the best first."""
    if device.type != "cpu":
        return (1,)
    return (32, 16) if dtype.itemsize < 4 else (16, 32)


def memory_order(x: Tensor) -> tuple[int, ...]:
    """Dimensions from the largest stride to the smallest, or () where that is their own order.

    Symbolic strides are compared by hint: what is decoded has the strides of what was encoded, which its readers view.
    An expanded dimension, whose stride is 0, stays where it is, as in the results of pointwise operations.
    """
    strides = [hint(n) for n in x.stride()]
    in_order = iter(sorted((d for d in range(x.dim()) if strides[d]), key=lambda d: -strides[d]))
    order = tuple(next(in_order) if strides[d] else d for d in range(x.dim()))
    return () if order == tuple(range(x.dim())) else order


def in_memory_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x with its dimensions in the order of :func:`memory_order`."""
    return x.permute(order) if order else x


def from_memory_order(flat: Tensor, shape: Sequence[int], order: tuple[int, ...]) -> Tensor:
    """The tensor of this shape whose elements, in that order, are ``flat``."""
    return arranged(flat.reshape(sizes_in_memory(shape, order)), order)


def sizes_in_memory(shape: Sequence[int], order: tuple[int, ...]) -> Sequence[int]:
    """The sizes of a tensor's dimensions in the order of :func:`memory_order`."""
    return [shape[d] for d in order] if order else shape


def arranged(elements: Tensor, order: tuple[int, ...]) -> Tensor:
    """The tensor whose dimensions, in that order, are given."""
    return elements.permute([order.index(d) for d in range(len(order))]) if order else elements


def _numel(x: Tensor) -> int:
    """The number of elements, as a product of sizes: a trace follows that of a tensor that is none of its inputs."""
    return math.prod(sizes_of(x))
