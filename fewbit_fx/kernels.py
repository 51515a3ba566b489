"""Compiled encode and decode for eager pipelines: tensors of any size, to exactly b bits per element.

Words of a tensor of n elements, b planes of each the same number of words:

    [ whole blocks, as BitPlanes packs them | the remaining elements, 32 to a word ]

The remainder goes through the same kernel as two padded blocks, with its elements dealt out so that
each word holds 32 neighbours and the words of the padding can be left away. So at most 31 bits
of a plane are padding, and each function is compiled once per bits, dtype and device, for all sizes
(two blocks, because torch.compile would make a kernel of its own for a single one).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbit_fx.codec import (
    WORD_BITS,
    at_least_float32,
    choose,
    encode,
    from_memory_order,
    in_memory_order,
    lanes_on,
    memory_order,
    multiply,
    padded,
    plane_layout,
)
from fewbit_fx.frames import in_a_frame_of_its_own
from fewbit_fx.functions import Pointwise
from fewbit_fx.levels import Codebook


@dataclass(frozen=True)
class Form:
    """All of a tensor but its values.

    Attributes:
        shape: Its shape.
        order: Its dimensions from the outermost to the innermost in memory, or () if that is their own order.
        dtype, device: Its dtype and device.
    """

    shape: torch.Size
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Form:
        """The form of a tensor."""
        return cls(x.shape, memory_order(x), x.dtype, x.device)

    def flatten(self, x: Tensor) -> Tensor:
        """The elements of a tensor of this shape, in this form's order in memory."""
        return in_memory_order(x, self.order).reshape(-1)

    def unflatten(self, flat: Tensor) -> Tensor:
        """The inverse of :meth:`flatten`."""
        return from_memory_order(flat, self.shape, self.order)

    @property
    def lanes(self) -> int:
        """Words that a kernel fills side by side."""
        return lanes_on(self.device)

    @property
    def whole(self) -> int:
        """Elements in whole blocks: none or at least two blocks."""
        blocks = self.shape.numel() // (WORD_BITS * self.lanes)
        return blocks * WORD_BITS * self.lanes if blocks > 1 else 0

    @property
    def rest(self) -> int:
        """The remaining elements, less than two blocks."""
        return self.shape.numel() - self.whole


def encode_tensor(derivative: Pointwise, codebook: Codebook, x: Tensor) -> Tensor:
    """Codes of f'(x).

    Args:
        derivative: f', pointwise, in float32 or float64; a cache keeps it and its kernel.
        codebook: Of f'.
        x: Tensor of any shape, strides and floating point dtype; only read.

    Returns:
        int32 words, shape (codebook.bits, ceil(x.numel() / 32)).
    """
    kernel = _encoder(derivative, codebook, x.dtype, x.device.type)
    form = Form.of(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        flat = form.flatten(x)
        parts = [kernel(_bare(flat[: form.whole]))] if form.whole else []
        if form.rest:
            words = kernel(_deal_out(flat[form.whole :], form.lanes))
            parts.append(words[:, : -(-form.rest // WORD_BITS)].clone())  # not a view, which would keep the padding
        if not parts:
            return x.new_empty((codebook.bits, 0), dtype=torch.int32)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def multiply_by_level(gradient: Tensor, words: Tensor, codebook: Codebook, form: Form) -> Tensor:
    """``gradient * level``, with the levels that ``words`` name.

    Args:
        gradient: Tensor of the shape of the coded x.
        words: Of :func:`encode_tensor`.
        codebook: The same.
        form: Of the coded x.

    Returns:
        Tensor of the form of x.
    """
    kernel = _decoder(codebook.bits, gradient.dtype, form.dtype, form.device.type)
    levels = _levels(codebook, form.device)
    with torch.no_grad(), torch.autocast(form.device.type, enabled=False):
        flat, first = form.flatten(gradient), form.whole // WORD_BITS
        parts = []
        if form.whole:
            parts = [kernel(_bare(flat[: form.whole]), _bare(words[:, :first].reshape(-1)), levels)]
        if form.rest:
            missing = 2 * form.lanes - (words.shape[1] - first)
            last = _bare(pad(words[:, first:], (0, missing)).view(-1))
            tail = kernel(_deal_out(flat[form.whole :], form.lanes), last, levels)
            parts.append(_collect(tail, form.lanes)[: form.rest])
        if not parts:
            return gradient.to(form.dtype)
        return form.unflatten(torch.cat(parts) if len(parts) > 1 else parts[0])


def _deal_out(rest: Tensor, lanes: int) -> Tensor:
    """Two padded blocks in which element 32 * i + j comes to bit j of word i."""
    blocks = pad(rest, (0, 2 * WORD_BITS * lanes - rest.numel()))
    return _bare(blocks.view(2, lanes, WORD_BITS).transpose(1, 2).reshape(-1))


def _bare(x: Tensor) -> Tensor:
    """Contiguous, and no view of anything: Dynamo would compile anew for every kind of view."""
    return x.contiguous().data


def _collect(dealt: Tensor, lanes: int) -> Tensor:
    """The elements of two blocks that were dealt out, in their first order."""
    return dealt.view(2, WORD_BITS, lanes).transpose(1, 2).reshape(-1)


@functools.lru_cache(maxsize=256)
def _encoder(derivative: Pointwise, codebook: Codebook, _dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    def encoder(x: Tensor) -> Tensor:
        layout = plane_layout(x)
        blocks = x.view(-1, WORD_BITS, layout.lanes)
        planes = encode(derivative(at_least_float32(blocks)), codebook.levels, layout)
        return torch.stack([plane.view(-1) for plane in planes])

    return _compiled(encoder)


@functools.lru_cache(maxsize=256)
def _decoder(bits: int, _gradient: torch.dtype, dtype: torch.dtype, _device: str) -> Callable[..., Tensor]:
    def decoder(gradient: Tensor, words: Tensor, levels: Tensor) -> Tensor:
        layout = plane_layout(gradient)
        blocks = gradient.view(-1, WORD_BITS, layout.lanes)
        wide = at_least_float32(blocks)
        planes = words.view(bits, -1, 1, layout.lanes).unbind()
        codes = [layout.unpack(plane, blocks.shape) != 0 for plane in planes]
        return multiply(wide, choose(levels.to(wide.dtype).unbind(), codes)).to(dtype).view(-1)

    return _compiled(decoder)


@functools.lru_cache(maxsize=256)
def _levels(codebook: Codebook, device: torch.device) -> Tensor:
    """All 2^bits levels as a tensor, so that codebooks share a decode kernel."""
    return torch.tensor(padded(codebook.levels), dtype=torch.float64, device=device)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile for sizes of all kinds, apart from all others: Dynamo limits compilations per code object."""
    return torch.compile(in_a_frame_of_its_own(function), dynamic=True, fullgraph=True)
