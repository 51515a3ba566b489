"""The activations of torch.nn.functional with few-bit saved tensors, for eager and compiled pipelines.

Each takes the arguments of its namesake, and ``bits``, 1 to 8 (default 3), and ``levels``, as of
:class:`fewbit_fx.FewBitConfig`. The result is the namesake's own, bit for bit. For the backward they save b bits per
element (fewer where fewer levels are exact: one for ReLU and its kind) instead of a whole tensor; and with
``levels="sampled"``, the default, up to 4 bits and where no levels are exact, the levels themselves, 2^b numbers for
each call or half of them. On tensors that are not strided ones (nested, sparse, MKL-DNN's, DTensor and its kind) they
are the namesake itself.

All raise TypeError or ValueError for ``bits`` or ``levels`` that are not allowed. Where the other arguments make a
derivative that cannot be coded, such as the constant one of ``leaky_relu`` with slope 1, they are
torch's own; ``pointwise`` raises NotCodableError, a ValueError.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit_fx.codebooks.activations import Pointwise
from fewbit_fx.config import FewBitConfig
from fewbit_fx.eager.autograd import apply_activation, apply_frozen_prelu, apply_function
from fewbit_fx.torch_private.tensors import is_plain

_BITS, _LEVELS = 3, "sampled"


def pointwise(function: Pointwise, input: Tensor, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """``function(input)`` for any pointwise function with a bounded derivative.

    Args:
        function: Takes a tensor, returns a tensor of the same shape, element by element. Use one function
            object for many calls, not a new lambda each time: it is fitted and compiled once per object.
            It may read other tensors, not trained ones; what it writes to is a copy of the input.
        input: Tensor of any shape.
        bits: Bits per element.
        levels: ``"sampled"`` or ``"typical"``.
    """
    return apply_function(function, input, bits, levels)


def elu(
    input: Tensor, alpha: float = 1.0, inplace: bool = False, *, bits: int = _BITS, levels: str = _LEVELS
) -> Tensor:
    """:func:`torch.nn.functional.elu`."""
    return apply_activation("elu", input, bits, levels, inplace, alpha=alpha)


def celu(
    input: Tensor, alpha: float = 1.0, inplace: bool = False, *, bits: int = _BITS, levels: str = _LEVELS
) -> Tensor:
    """:func:`torch.nn.functional.celu`."""
    return apply_activation("celu", input, bits, levels, inplace, alpha=alpha)


def selu(input: Tensor, inplace: bool = False, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.selu`."""
    return apply_activation("selu", input, bits, levels, inplace)


def gelu(input: Tensor, approximate: str = "none", *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.gelu`, exact (``"none"``) or by ``"tanh"``.

    Examples:
        >>> import torch, fewbit_fx
        >>> x = torch.linspace(-3, 3, 1024, requires_grad=True)
        >>> y = fewbit_fx.functional.gelu(x, bits=2)
        >>> torch.equal(y, torch.nn.functional.gelu(x))
        True
        >>> y.sum().backward()
        >>> x.grad.unique().numel()  # levels
        4
    """
    return apply_activation("gelu", input, bits, levels, approximate=approximate)


def silu(input: Tensor, inplace: bool = False, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.silu`."""
    return apply_activation("silu", input, bits, levels, inplace)


def mish(input: Tensor, inplace: bool = False, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.mish`."""
    return apply_activation("mish", input, bits, levels, inplace)


def softplus(
    input: Tensor, beta: float = 1.0, threshold: float = 20.0, *, bits: int = _BITS, levels: str = _LEVELS
) -> Tensor:
    """:func:`torch.nn.functional.softplus`."""
    return apply_activation("softplus", input, bits, levels, beta=beta, threshold=threshold)


def softsign(input: Tensor, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.softsign`."""
    return apply_activation("softsign", input, bits, levels)


def tanh(input: Tensor, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.tanh`."""
    return apply_activation("tanh", input, bits, levels)


def tanhshrink(input: Tensor, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.tanhshrink`."""
    return apply_activation("tanhshrink", input, bits, levels)


def sigmoid(input: Tensor, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.sigmoid`."""
    return apply_activation("sigmoid", input, bits, levels)


def logsigmoid(input: Tensor, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.logsigmoid`."""
    return apply_activation("logsigmoid", input, bits, levels)


def hardswish(input: Tensor, inplace: bool = False, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.hardswish`."""
    return apply_activation("hardswish", input, bits, levels, inplace)


def hardsigmoid(input: Tensor, inplace: bool = False, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.hardsigmoid`."""
    return apply_activation("hardsigmoid", input, bits, levels, inplace)


def hardtanh(
    input: Tensor,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
    *,
    bits: int = _BITS,
    levels: str = _LEVELS,
) -> Tensor:
    """:func:`torch.nn.functional.hardtanh`."""
    return apply_activation("hardtanh", input, bits, levels, inplace, min_val=min_val, max_val=max_val)


def relu(input: Tensor, inplace: bool = False, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.relu`."""
    return apply_activation("relu", input, bits, levels, inplace)


def relu6(input: Tensor, inplace: bool = False, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.relu6`."""
    return apply_activation("relu6", input, bits, levels, inplace)


def leaky_relu(
    input: Tensor, negative_slope: float = 0.01, inplace: bool = False, *, bits: int = _BITS, levels: str = _LEVELS
) -> Tensor:
    """:func:`torch.nn.functional.leaky_relu`."""
    return apply_activation("leaky_relu", input, bits, levels, inplace, negative_slope=negative_slope)


def rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
    *,
    bits: int = _BITS,
    levels: str = _LEVELS,
) -> Tensor:
    """:func:`torch.nn.functional.rrelu`; in training, with its random slopes, it is torch's own."""
    if training or not is_plain(input):
        FewBitConfig(bits=bits, levels=levels)
        return F.rrelu(input, lower, upper, training, inplace)
    return apply_activation("leaky_relu", input, bits, levels, inplace, negative_slope=(lower + upper) / 2)


def prelu(input: Tensor, weight: Tensor, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.prelu`, in one exact bit per element where ``weight`` is frozen.

    The gradient of a trained weight needs the input itself: then it is torch's own.
    """
    FewBitConfig(bits=bits, levels=levels)
    wanted = torch.is_grad_enabled() and input.requires_grad and not weight.requires_grad
    wanted = wanted and is_plain(input) and is_plain(weight)
    if not wanted or torch.compiler.is_compiling():  # within torch.compile, the backend packs the mask
        return F.prelu(input, weight)
    return apply_frozen_prelu(input, weight)


def hardshrink(input: Tensor, lambd: float = 0.5, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.hardshrink`."""
    return apply_activation("hardshrink", input, bits, levels, lambd=lambd)


def softshrink(input: Tensor, lambd: float = 0.5, *, bits: int = _BITS, levels: str = _LEVELS) -> Tensor:
    """:func:`torch.nn.functional.softshrink`."""
    return apply_activation("softshrink", input, bits, levels, lambd=lambd)


def threshold(
    input: Tensor, threshold: float, value: float, inplace: bool = False, *, bits: int = _BITS, levels: str = _LEVELS
) -> Tensor:
    """:func:`torch.nn.functional.threshold`."""
    return apply_activation("threshold", input, bits, levels, inplace, threshold=threshold, value=value)
