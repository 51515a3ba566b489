"""Compiled fit, encode and decode for eager pipelines: tensors of any size, to exactly b bits per element.

Levels that are the tensor's own are fitted once to the whole tensor, by a kernel that is given some 500 elements of it
and is compiled once for all shapes: where those elements are is kept for each shape. The other kernels take what was
fitted as an argument.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from fewbit_fx.codec.sampled_levels import SampledScheme, both_sides
from fewbit_fx.codec.scheme import CodingScheme, NearestScheme
from fewbit_fx.codec.spread import positions_all_over
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
    """Codes of f'(x), by kernels for each dtype and kind of device. They live as long as the encoder.

    Attributes:
        derivative: f', pointwise, in float32 or float64.
        scheme: How f' is coded.
    """

    derivative: Pointwise
    scheme: NearestScheme
    _kernels: dict[tuple[object, torch.dtype, str], Kernel] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encode.

        Args:
            x: Tensor of any shape, strides and floating point dtype; only read.

        Returns:
            int32 words, shape (b, ceil(x.numel() / 32)); and the levels, where they are the tensor's own.
        """
        kernel, form = self._kernel(_encoder, x), MemoryForm.of(x)
        with _plain_arithmetic(x):
            if not x.numel():
                return (x.new_empty((self.scheme.code_bits, 0), dtype=torch.int32),)
            flat = form.flatten(x)
            lower, levels = self._fit(flat, form)
            parts = [kernel(_bare(flat[: form.whole]), *lower)] if form.whole else []
            if form.rest:
                words = kernel(_deal_out(flat[form.whole :], form.lanes), *lower)
                parts.append(words[:, : -(-form.rest // WORD_BITS)].clone())  # not a view, which would keep the padding
            return torch.cat(parts, 1) if len(parts) > 1 else parts[0], *levels

    def _fit(self, flat: Tensor, form: MemoryForm) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Where intervals begin and their levels, both in a tuple; nothing where a codebook has the levels."""
        if not isinstance(self.scheme, SampledScheme):
            return (), ()
        positions = _kept_positions if runs_compiled(flat) else _positions
        drawn = flat.index_select(0, positions(form.shape, form.order, self.scheme.points, form.device))
        lower, levels = self._kernel(_fitter, flat)(drawn)
        return (_bare(lower),), (levels,)

    def _kernel(self, make: Callable[[Pointwise, Any], Kernel], x: Tensor) -> Kernel:
        key = make, x.dtype, x.device.type
        if key not in self._kernels:
            self._kernels[key] = make(self.derivative, self.scheme)
        return self._kernels[key]


def multiply_by_level(gradient: Tensor, saved: Sequence[Tensor], scheme: NearestScheme, form: MemoryForm) -> Tensor:
    """``gradient * level``, with the levels that codes name.

    Args:
        gradient: Tensor of the shape of the coded x.
        saved: The result of an :class:`Encoder`.
        scheme: The encoder's scheme.
        form: The form of the tensor that was encoded.

    Returns:
        Tensor of the form of x.
    """
    with _plain_arithmetic(gradient):
        if not gradient.numel():
            return gradient.to(form.dtype)
        words, *own = saved
        if isinstance(scheme, CodingScheme):
            table = _kept_levels if runs_compiled(gradient) else _levels
            levels, sum_of_sides = table(scheme.levels, form.device), None
        else:
            levels, sum_of_sides = _bare(own[0]), scheme.sum_of_sides if scheme.mirrored else None
        kinds = gradient.dtype, levels.dtype, form.dtype, form.device.type
        kernel = _decoder(scheme.code_bits, scheme.guarded, scheme.mirrored, sum_of_sides, *kinds)
        flat, first = form.flatten(gradient), form.whole // WORD_BITS
        parts = []
        if form.whole:
            parts = [kernel(_bare(flat[: form.whole]), _bare(words[:, :first].reshape(-1)), levels)]
        if form.rest:
            missing = 2 * form.lanes - (words.shape[1] - first)
            last = _bare(pad(words[:, first:], (0, missing)).reshape(-1))
            tail = kernel(_deal_out(flat[form.whole :], form.lanes), last, levels)
            parts.append(_collect(tail, form.lanes)[: form.rest])
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


def _fitter(derivative: Pointwise, scheme: SampledScheme) -> Kernel:
    def fitter(drawn: Tensor) -> tuple[Tensor, Tensor]:
        fitted = scheme.fit_to(drawn, lambda points: derivative(at_least_float32(points)))
        return fitted.lower, fitted.levels

    return Kernel(fitter, dynamic=False)


def _encoder(derivative: Pointwise, scheme: NearestScheme) -> Kernel:
    def slope(blocks: Tensor) -> Tensor:
        return derivative(at_least_float32(blocks))

    def words(x: Tensor, lower: tuple[Tensor, ...], compiled: bool) -> Tensor:
        layout = PlaneLayout(lanes_for(x.device, x.dtype)[0])
        if isinstance(scheme, SampledScheme):
            bits = scheme.bits(layout.blocks(x), slope, lower[0], compiled)
        else:
            bits = scheme.bits(layout.blocks(x), slope, compiled)
        weights = bit_weights(x.device)
        planes = [layout.pack(bit, weights) for bit in bits]
        saved = marked_words(planes, layout.blocks(x), scheme.mirrored) if scheme.guarded else planes
        return torch.stack([plane.view(-1) for plane in saved])

    def encoder(x: Tensor, *lower: Tensor) -> Tensor:
        return words(x, lower, True)

    return Kernel(encoder, lambda x, *lower: words(x, lower, False))


@functools.lru_cache(maxsize=256)
def _decoder(
    bits: int,
    guarded: bool,
    mirrored: bool,
    sum_of_sides: tuple[int, int] | None,
    _gradient: torch.dtype,
    _levels: torch.dtype,
    dtype: torch.dtype,
    _device: str,
) -> Kernel:
    """A decode kernel. It is given the level of each code; where a sum of sides is known, those of one side."""

    def decoder(gradient: Tensor, words: Tensor, levels: Tensor) -> Tensor:
        layout = PlaneLayout(lanes_for(gradient.device, dtype)[0])
        wide = at_least_float32(layout.blocks(gradient))
        codes = unpack(words.view(bits, -1, 1, layout.lanes).unbind(), layout, guarded)
        own = levels.to(wide.dtype).unbind()
        table = own if sum_of_sides is None else both_sides(own, sum_of_sides)
        level = select_level(table, codes, guarded, mirrored)
        return multiply(wide, level).to(dtype).view(-1)

    return Kernel(decoder)


def _levels(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The level of each code as a tensor, so that codebooks share a decode kernel."""
    return torch.tensor(by_code(levels), dtype=torch.float64, device=device)


def _positions(shape: torch.Size, order: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Where ``elements_all_over`` of a tensor, as many as asked for, are in its order in memory."""
    where = positions_all_over(shape, torch.arange(count, device=device))
    position = torch.zeros(count, dtype=torch.int64, device=device)
    for d in order or range(len(shape)):
        position = position * shape[d] + where[d]
    return position


_kept_levels = functools.lru_cache(maxsize=256)(_levels)  # of real tensors only
_kept_positions = functools.lru_cache(maxsize=256)(_positions)  # likewise


class Kernel:
    """A compiled function; its operations one by one where compiled code cannot be called.

    Args:
        function: A plain function of tensors.
        uncompiled: The same in operations that are known everywhere, where ``function`` has others.
        dynamic: Whether sizes differ from call to call.
    """

    def __init__(
        self, function: Callable[..., Any], uncompiled: Callable[..., Any] | None = None, dynamic: bool = True
    ) -> None:
        self._function = uncompiled or function
        # Apart from all others, since Dynamo limits compilations per code object.
        self._compiled = torch.compile(with_own_code_object(function), dynamic=dynamic, fullgraph=True)

    def __call__(self, *tensors: Tensor) -> Any:
        """The function's value."""
        return (self._compiled if runs_compiled(*tensors) else self._function)(*tensors)
