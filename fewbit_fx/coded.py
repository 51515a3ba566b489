"""A pointwise function whose backward reads few-bit codes: what the drop-in functions and modules share."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fewbit_fx.codec import at_least_float32, decode, encode, multiply, plane_layout
from fewbit_fx.config import FewBitConfig
from fewbit_fx.fitting import codebook
from fewbit_fx.functions import Pointwise, trace_derivative
from fewbit_fx.kernels import Form, encode_tensor, multiply_by_level
from fewbit_fx.levels import Codebook
from fewbit_fx.sampling import NotCodableError


@dataclass(frozen=True)
class Activation:
    """A function of torch.nn.functional with its arguments; equal ones are interchangeable.

    Attributes:
        name: Of the function.
        arguments: All but the first, as pairs of keyword and value.
    """

    name: str
    arguments: tuple[tuple[str, float | str], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """The function's value."""
        result: Tensor = getattr(F, self.name)(x, **dict(self.arguments))
        return result

    def rounded(self, dtype: torch.dtype) -> Activation:
        """The same with its thresholds rounded to a dtype, in which torch's eager kernels compare."""
        rounded = dict(self.arguments)
        for keyword in _THRESHOLDS[self.name]:
            rounded[keyword] = torch.tensor(rounded[keyword], dtype=dtype).item()
        return Activation(self.name, tuple(rounded.items()))


# Arguments that x is compared with; a float off, and the bit of an element is wrong.
_THRESHOLDS = {
    "hardtanh": ("min_val", "max_val"),
    "hardshrink": ("lambd",),
    "softshrink": ("lambd",),
}


@dataclass(frozen=True)
class CodedFunction:
    """A pointwise function, its derivative, and the derivative's codebook.

    Attributes:
        function: Hashable, and equal for equal functions.
        derivative: As a graph of ATen operations.
        codebook: Of the derivative.
    """

    function: Pointwise
    derivative: fx.GraphModule = field(compare=False)
    codebook: Codebook

    def __call__(self, x: Tensor) -> Tensor:
        """``function(x)``; where a gradient is wanted, b bits per element are saved for it."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _apply(_Eager, x, self)
        return self.function(x)


def apply_activation(name: str, x: Tensor, bits: int, inplace: bool = False, **arguments: float | str) -> Tensor:
    """A function of torch.nn.functional with b bits per element saved.

    Args:
        name: Of the function.
        x: Tensor of any shape and floating point dtype.
        bits: 1 to 8.
        inplace: Write the result to x, as torch's in-place functions do.
        **arguments: Of the function.

    Where the arguments make a derivative that cannot be coded, such as a constant one, it is torch's own.

    Raises:
        ValueError, TypeError: ``bits`` is not allowed.
    """
    _require_bits(bits)
    if not x.is_floating_point():  # complex numbers have another derivative
        return Activation(name, tuple(arguments.items()))(x)
    if torch.compiler.is_compiling():
        function = functools.partial(getattr(F, name), **arguments)
        levels = _levels_of_activation(name, tuple(arguments.items()), bits)
        y = function(x) if levels is None else _apply(_InGraph, x, function, levels)
    else:
        activation = Activation(name, tuple(arguments.items()))
        y = (coded_activation(activation, bits, x.dtype) or activation)(x)
    return x.copy_(y) if inplace else y


def apply_function(function: Pointwise, x: Tensor, bits: int, levels: tuple[float, ...] | None = None) -> Tensor:
    """The same for any pointwise function. Raises as :func:`fewbit_fx.codebook` does.

    Args:
        function: Pointwise, hashable, and equal for equal functions.
        x: Tensor of any shape and floating point dtype.
        bits: 1 to 8.
        levels: Of its codebook, where they are known. Dynamo of torch 2.11 can look them up by itself for
            plain functions, not for callable objects.
    """
    _require_bits(bits)
    if not x.is_floating_point():
        raise TypeError(f"a few-bit function takes floating point tensors; got {x.dtype}")
    if torch.compiler.is_compiling():
        return _apply(_InGraph, x, function, levels or _levels_of_function(function, bits))
    return coded_function(function, bits)(x)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]
def _require_bits(bits: int) -> bool:
    """Raise as every other use of the option does, whatever a cache holds."""
    return FewBitConfig(bits=bits).bits == bits


def coded_activation(activation: Activation, bits: int, dtype: torch.dtype) -> CodedFunction | None:
    """The coded form of an activation for eager tensors of a dtype; None if it has none."""
    compared_in = dtype if activation.name in _THRESHOLDS else None
    return _coded_activation(activation, bits, compared_in)


@functools.lru_cache(maxsize=1024)
def _coded_activation(activation: Activation, bits: int, compared_in: torch.dtype | None) -> CodedFunction | None:
    fitted = _codebook_of_activation(activation, bits)
    if fitted is None:
        return None
    compared = activation.rounded(compared_in) if compared_in else activation
    return CodedFunction(activation, trace_derivative(compared), fitted)


def _codebook_of_activation(activation: Activation, bits: int) -> Codebook | None:
    try:
        return codebook(activation, bits, "typical")  # as the backend does
    except NotCodableError:
        return None


@functools.lru_cache(maxsize=1024)
def coded_function(function: Pointwise, bits: int) -> CodedFunction:
    """The coded form of any pointwise function. Raises as :func:`fewbit_fx.codebook` does."""
    fitted = codebook(function, bits, "typical")
    return CodedFunction(function, trace_derivative(function), fitted)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]  # Dynamo is not to trace the fit
def _levels_of_activation(
    name: str, arguments: tuple[tuple[str, float | str], ...], bits: int
) -> tuple[float, ...] | None:
    fitted = _codebook_of_activation(Activation(name, arguments), bits)
    return fitted.levels if fitted else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]
def _levels_of_function(function: Pointwise, bits: int) -> tuple[float, ...]:
    return codebook(function, bits, "typical").levels


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    return function.apply(*arguments)  # type: ignore[no-any-return,no-untyped-call,unused-ignore]


class _Eager(torch.autograd.Function):
    """Outside of torch.compile: the function's own kernel, and compiled ones for the codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coded: CodedFunction) -> Tensor:
        ctx.save_for_backward(encode_tensor(coded.derivative, coded.codebook, x))
        ctx.codebook, ctx.form = coded.codebook, Form.of(x)
        return coded.function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (words,) = ctx.saved_tensors
        return _apply(_Decode, gradient, words, ctx.codebook, ctx.form), None


class _Decode(torch.autograd.Function):
    """The backward of :class:`_Eager`, which itself has none."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, words: Tensor, codebook: Codebook, form: Form) -> Tensor:
        return multiply_by_level(gradient, words, codebook, form)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "a fewbit activation cannot be differentiated twice: it keeps few-bit codes of its derivative, from "
            "which no second derivative follows; use torch.nn's own where a gradient is differentiated again"
        )


class _InGraph(torch.autograd.Function):
    """Within torch.compile: plain ATen operations for the compiler to fuse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Pointwise, levels: tuple[float, ...]) -> Tensor:
        wide = at_least_float32(x)
        pullback = torch.func.vjp(function, wide)[1]
        (derivative,) = pullback(torch.ones_like(wide))
        ctx.save_for_backward(*encode(derivative, levels, plane_layout(x)))
        ctx.levels, ctx.layout, ctx.shape, ctx.dtype = levels, plane_layout(x), x.shape, x.dtype
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        wide = at_least_float32(gradient)
        level = decode(ctx.saved_tensors, ctx.levels, ctx.layout, ctx.shape, wide.dtype)
        return multiply(wide, level).to(ctx.dtype), None, None


class FrozenPReLU(torch.autograd.Function):
    """PReLU whose slopes are not trained: one bit per element, and exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """torch's own."""
        step = coded_function(F.relu, 1)
        ctx.save_for_backward(encode_tensor(step.derivative, step.codebook, x), weight)
        ctx.codebook, ctx.form = step.codebook, Form.of(x)
        return F.prelu(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient where x is positive, and the slopes times it elsewhere."""
        words, weight = ctx.saved_tensors
        positive = multiply_by_level(torch.ones_like(gradient), words, ctx.codebook, ctx.form) != 0
        if weight.numel() > 1:
            weight = weight.view(-1, *[1] * (gradient.dim() - 2))
        return torch.where(positive, gradient, weight * gradient), None
