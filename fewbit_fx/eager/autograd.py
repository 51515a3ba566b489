"""Pointwise functions whose backward reads few-bit codes: what the drop-in functions and modules call."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit_fx.codebooks.activations import Pointwise
from fewbit_fx.codec.bitplanes import plane_layout
from fewbit_fx.codec.encode_decode import at_least_float32, multiply
from fewbit_fx.codec.scheme import CodingScheme, NearestScheme
from fewbit_fx.config import FewBitConfig
from fewbit_fx.eager.coded_derivative import (
    NAMED,
    Activation,
    CodedDerivative,
    coded_activation,
    coded_function,
    name_of_activation,
    name_of_function,
)
from fewbit_fx.eager.kernels import MemoryForm, multiply_by_level
from fewbit_fx.torch_private.sizes import statically_known_true
from fewbit_fx.torch_private.tensors import is_plain


def apply_activation(
    name: str, x: Tensor, bits: int, levels: str, inplace: bool = False, **arguments: float | str
) -> Tensor:
    """A function of torch.nn.functional with b bits per element saved.

    Args:
        name: The name of the function in torch.nn.functional.
        x: Tensor of any shape and floating point dtype.
        bits: 1 to 8.
        levels: What the levels fit, ``"sampled"`` or ``"typical"``.
        inplace: Write the result to x, as torch's in-place functions do.
        **arguments: The other arguments of the function.

    Where the arguments make a derivative that cannot be coded, such as a constant one, it is torch's own, and so
    it is for complex tensors, whose derivative is another, and tensors that are not strided ones.

    Raises:
        ValueError, TypeError: ``bits`` or ``levels`` is not allowed.
    """
    _require(bits, levels)
    if not (x.is_floating_point() and is_plain(x)):
        result: Tensor = getattr(F, name)(x, **arguments, **({"inplace": True} if inplace else {}))
        return result
    if torch.compiler.is_compiling():
        function = functools.partial(getattr(F, name), **arguments)
        found = name_of_activation(name, tuple(arguments.items()), bits, levels)
        y = function(x) if found is None else _apply_in_graph(x, function, getattr(NAMED, found))
    else:
        activation = Activation(name, tuple(arguments.items()))
        coded = coded_activation(activation, bits, levels, x.dtype, x.device)
        y = activation(x) if coded is None else _apply_eagerly(x, activation, coded)
    return x.copy_(y) if inplace else y


def apply_function(
    function: Pointwise, x: Tensor, bits: int, levels: str, coded: CodedDerivative | None = None
) -> Tensor:
    """Any pointwise function with b bits per element saved. It raises what :func:`fewbit_fx.codebook` raises.

    Args:
        function: Pointwise, hashable, and equal for equal functions.
        x: Tensor of any shape and floating point dtype. Of one that is not strided nothing is coded.
        bits: 1 to 8.
        levels: What the levels fit, ``"sampled"`` or ``"typical"``.
        coded: The few-bit form of the function's derivative, where it is known. Dynamo of torch 2.11 can look it up
            by itself for plain functions, not for callable objects.
    """
    _require(bits, levels)
    if not x.is_floating_point():
        raise TypeError(f"a few-bit function takes floating point tensors; got {x.dtype}")
    if torch.compiler.is_compiling():
        known: CodedDerivative = coded or getattr(NAMED, name_of_function(function, bits, levels))
        return _apply_in_graph(x, function, known) if is_plain(x) else known.value(function, x)
    return _apply_eagerly(x, function, coded or coded_function(function, bits, levels))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]
def _require(bits: int, levels: str) -> bool:
    """Raise as every other use of the options does, whatever a cache holds."""
    return FewBitConfig(bits=bits, levels=levels).bits == bits


def _apply_eagerly(x: Tensor, function: Pointwise, coded: CodedDerivative) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad and is_plain(x):
        return _apply(_Eager, x, function, coded)[0]  # type: ignore[no-any-return]
    return coded.value(function, x)


def _apply_in_graph(x: Tensor, function: Pointwise, coded: CodedDerivative) -> Tensor:
    if isinstance(coded.scheme, CodingScheme) or statically_known_true(x.numel() > 0):
        return _apply(_InGraph, x, function, coded)  # type: ignore[no-any-return]
    return coded.value(function, x)  # it may have no element to sample


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call,unused-ignore]


class _Eager(torch.autograd.Function):
    """Outside of torch.compile: the function's own kernel, and compiled ones for the codes.

    In the form that torch.func's transforms take: what is saved is an output, which :func:`_apply_eagerly` drops.
    The last one is an empty tensor, through which the backward still depends on x when it is differentiated in
    its turn: the codes alone would pass for constants, and the second derivative for zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, function: Pointwise, coded: CodedDerivative) -> tuple[Tensor, ...]:
        codes = coded.encoder(x)
        return coded.value(function, x), *codes, x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, coded = inputs
        _, *codes, link = output
        ctx.mark_non_differentiable(*codes)
        ctx.set_materialize_grads(False)  # or the backward would be given zeros for the codes
        ctx.save_for_backward(*codes, link)
        ctx.scheme, ctx.form = coded.scheme, MemoryForm.of(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None]:
        if gradient is None:
            return None, None, None
        return _apply(_Decode, gradient, ctx.scheme, ctx.form, *ctx.saved_tensors), None, None


class _Decode(torch.autograd.Function):
    """The backward of :class:`_Eager`, which itself has none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, scheme: NearestScheme, form: MemoryForm, *saved: Tensor) -> Tensor:
        return multiply_by_level(gradient, saved[:-1], scheme, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass  # nothing is kept: there is no backward

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "a fewbit activation cannot be differentiated twice: it keeps few-bit codes of its derivative, from "
            "which no second derivative follows; use torch.nn's own where a gradient is differentiated again"
        )


class _InGraph(torch.autograd.Function):
    """Within torch.compile: plain ATen operations for the compiler to fuse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Pointwise, coded: CodedDerivative) -> Tensor:
        scheme, derivative, layout = coded.scheme, coded.derivative, plane_layout(x)
        ctx.save_for_backward(*scheme.encode(x, lambda v: derivative(at_least_float32(v)), layout))
        ctx.scheme, ctx.layout, ctx.dtype = scheme, layout, x.dtype
        return coded.value(function, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.scheme.decode(gradient, ctx.saved_tensors, ctx.layout, ctx.dtype, multiply), None, None


def apply_frozen_prelu(x: Tensor, weight: Tensor) -> Tensor:
    """PReLU whose slopes are not trained: one bit per element, and exact."""
    return _apply(_FrozenPReLU, x, weight, coded_function(F.relu, 1, "typical"))[0]  # type: ignore[no-any-return]


class _FrozenPReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, step: CodedDerivative) -> tuple[Tensor, Tensor]:
        (words,) = step.encoder(x)
        return F.prelu(x, weight), words

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, step = inputs
        _, words = output
        ctx.mark_non_differentiable(words)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(words, weight)
        ctx.scheme, ctx.form = step.scheme, MemoryForm.of(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _words: None) -> tuple[Tensor | None, None, None]:
        """The gradient where x is positive, and the slopes times it elsewhere; the second derivative is 0 indeed."""
        if gradient is None:
            return None, None, None
        words, weight = ctx.saved_tensors
        positive = multiply_by_level(torch.ones_like(gradient), [words], ctx.scheme, ctx.form) != 0
        if weight.numel() > 1:
            weight = weight.view(-1, *[1] * (gradient.dim() - 2))
        return torch.where(positive, gradient, weight * gradient), None, None
