"""Compiled encode and decode for eager pipelines: tensors of any size, to exactly b bits per element.

Words of a tensor of n elements, b planes of each the same number of words:

    [ whole blocks, as PlaneLayout packs them | the remaining elements, 32 to a word ]

The remainder goes through the same kernel as two padded blocks, with its elements dealt out so that
each word holds 32 neighbours and the words of the padding can be left away. So at most 31 bits
of a plane are padding, and each function is compiled once per bits, dtype and device, for all sizes
(two blocks, because torch.compile would make a kernel of its own for a single one).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbit_fx.codebooks.activations import Pointwise
from fewbit_fx.codec.bitplanes import (
    WORD_BITS,
    PlaneLayout,
    bit_weights,
    from_memory_order,
    in_memory_order,
    lanes_for,
    memory_order,
)
from fewbit_fx.codec.encode_decode import at_least_float32, by_code, marked_words, multiply, select_level, unpack
from fewbit_fx.codec.scheme import CodingScheme
from fewbit_fx.torch_private.frames import with_own_code_object
from fewbit_fx.torch_private.modes import mode_of, runs_compiled


@dataclass(frozen=True)
class MemoryForm:
    """Shape, order in memory, dtype and device of a tensor.

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
    def of(cls, x: Tensor) -> MemoryForm:
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
        return lanes_for(self.device, self.dtype)[0]

    @property
    def whole(self) -> int:
        """Elements in whole blocks: none or at least two blocks."""
        blocks = self.shape.numel() // (WORD_BITS * self.lanes)
        return blocks * WORD_BITS * self.lanes if blocks > 1 else 0

    @property
    def rest(self) -> int:
        """The remaining elements, less than two blocks."""
        return self.shape.numel() - self.whole


@dataclass(frozen=True, eq=False)
class Encoder:
    """Codes of f'(x), by a kernel for each dtype and kind of device. They live as long as the encoder.

    Attributes:
        derivative: f', pointwise, in float32 or float64.
        scheme: How f' is coded.
    """

    derivative: Pointwise
    scheme: CodingScheme
    _kernels: dict[tuple[torch.dtype, str], Kernel] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, x: Tensor) -> Tensor:
        """Encode.

        Args:
            x: Tensor of any shape, strides and floating point dtype; only read.

        Returns:
            int32 words, shape (b, ceil(x.numel() / 32)).
        """
        kernel, form = self._kernel(x), MemoryForm.of(x)
        with _plain_arithmetic(x):
            flat = form.flatten(x)
            parts = [kernel(_bare(flat[: form.whole]))] if form.whole else []
            if form.rest:
                words = kernel(_deal_out(flat[form.whole :], form.lanes))
                parts.append(words[:, : -(-form.rest // WORD_BITS)].clone())  # not a view, which would keep the padding
            if not parts:
                return x.new_empty((self.scheme.codebook.bits, 0), dtype=torch.int32)
            return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _kernel(self, x: Tensor) -> Kernel:
        key = x.dtype, x.device.type
        if key not in self._kernels:
            self._kernels[key] = _encoder(self.derivative, self.scheme)
        return self._kernels[key]


def multiply_by_level(gradient: Tensor, words: Tensor, scheme: CodingScheme, form: MemoryForm) -> Tensor:
    """``gradient * level``, with the levels that ``words`` name.

    Args:
        gradient: Tensor of the shape of the coded x.
        words: The result of an :class:`Encoder`.
        scheme: The encoder's scheme.
        form: The form of the tensor that was encoded.

    Returns:
        Tensor of the form of x.
    """
    book, guarded, mirrored = scheme.codebook, scheme.guarded, scheme.mirrored
    kernel = _decoder(book.bits, guarded, mirrored, gradient.dtype, form.dtype, form.device.type)
    with _plain_arithmetic(gradient):
        table = _kept_levels if runs_compiled(gradient) else _levels
        levels = table(book.levels, form.device)
        flat, first = form.flatten(gradient), form.whole // WORD_BITS
        parts = []
        if form.whole:
            parts = [kernel(_bare(flat[: form.whole]), _bare(words[:, :first].reshape(-1)), levels)]
        if form.rest:
            missing = 2 * form.lanes - (words.shape[1] - first)
            last = _bare(pad(words[:, first:], (0, missing)).reshape(-1))
            tail = kernel(_deal_out(flat[form.whole :], form.lanes), last, levels)
            parts.append(_collect(tail, form.lanes)[: form.rest])
        if not parts:
            return gradient.to(form.dtype)
        return form.unflatten(torch.cat(parts) if len(parts) > 1 else parts[0])


@contextlib.contextmanager
def _plain_arithmetic(x: Tensor) -> Iterator[None]:
    """No gradients, no autocast, whatever goes on around."""
    device = x.device.type
    has_autocast = torch.amp.is_autocast_available(device)
    autocast = torch.autocast(device, enabled=False) if has_autocast else contextlib.nullcontext()
    with torch.no_grad(), autocast, mode_of(x):
        yield


def _deal_out(rest: Tensor, lanes: int) -> Tensor:
    """Two padded blocks in which element 32 * i + j comes to bit j of word i."""
    blocks = pad(rest, (0, 2 * WORD_BITS * lanes - rest.numel()))
    return _bare(blocks.view(2, lanes, WORD_BITS).transpose(1, 2).reshape(-1))


def _bare(x: Tensor) -> Tensor:
    """Contiguous, and no view of anything: Dynamo would compile anew for every kind of view."""
    return x.contiguous().data if runs_compiled(x) else x


def _collect(dealt: Tensor, lanes: int) -> Tensor:
    """The elements of two blocks that were dealt out, in their first order."""
    return dealt.view(2, WORD_BITS, lanes).transpose(1, 2).reshape(-1)


def _encoder(derivative: Pointwise, scheme: CodingScheme) -> Kernel:
    def words(x: Tensor, compiled: bool) -> Tensor:
        layout = PlaneLayout(lanes_for(x.device, x.dtype)[0])
        bits = scheme.bits(layout.blocks(x), lambda blocks: derivative(at_least_float32(blocks)), compiled)
        weights = bit_weights(x.device)
        planes = [layout.pack(bit, weights) for bit in bits]
        saved = marked_words(planes, layout.blocks(x), scheme.mirrored) if scheme.guarded else planes
        return torch.stack([plane.view(-1) for plane in saved])

    def encoder(x: Tensor) -> Tensor:
        return words(x, True)

    return Kernel(encoder, lambda x: words(x, False))


@functools.lru_cache(maxsize=256)
def _decoder(
    bits: int, guarded: bool, mirrored: bool, _gradient: torch.dtype, dtype: torch.dtype, _device: str
) -> Kernel:
    def decoder(gradient: Tensor, words: Tensor, levels: Tensor) -> Tensor:
        layout = PlaneLayout(lanes_for(gradient.device, dtype)[0])
        wide = at_least_float32(layout.blocks(gradient))
        codes = unpack(words.view(bits, -1, 1, layout.lanes).unbind(), layout, guarded)
        level = select_level(levels.to(wide.dtype).unbind(), codes, guarded, mirrored)
        return multiply(wide, level).to(dtype).view(-1)

    return Kernel(decoder)


def _levels(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The level of each code as a tensor, so that codebooks share a decode kernel."""
    return torch.tensor(by_code(levels), dtype=torch.float64, device=device)


_kept_levels = functools.lru_cache(maxsize=256)(_levels)  # of real tensors only


class Kernel:
    """A function compiled for sizes of all kinds; its operations one by one where compiled code cannot be called.

    Args:
        function: A plain function of tensors.
        uncompiled: The same in operations that are known everywhere, where ``function`` has others.
    """

    def __init__(self, function: Callable[..., Tensor], uncompiled: Callable[..., Tensor] | None = None) -> None:
        self._function = uncompiled or function
        # Apart from all others, since Dynamo limits compilations per code object.
        self._compiled = torch.compile(with_own_code_object(function), dynamic=True, fullgraph=True)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function's value."""
        return (self._compiled if runs_compiled(*tensors) else self._function)(*tensors)
