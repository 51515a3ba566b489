"""Named activations, their derivatives, and which of them has a given derivative."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit_fx.codebooks.fitting import Array
from fewbit_fx.codebooks.sampling import Function
from fewbit_fx.torch_private.graphs import trace_for_all_shapes
from fewbit_fx.torch_private.modes import neutral_hooks, real_mode
from fewbit_fx.torch_private.tensors import version

Pointwise = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Pointwise] = {
    "gelu": F.gelu,
    "gelu (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "tanh": torch.tanh,
    "tanhshrink": F.tanhshrink,
    "softsign": F.softsign,
    "softplus": F.softplus,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky relu": F.leaky_relu,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "atan": torch.atan,
    "squared relu": lambda x: torch.relu(x) ** 2,
    "exp": torch.exp,
    "square": torch.square,
}

# Off the kinks of the piecewise functions, wide enough to tell each from the others.
_PROBE: Array = np.linspace(-7.93, 7.97, 160)

# Farther out, where clamp(0, 20) is not relu. A formula in exp(x) may overflow there.
_FAR: Array = np.array([20.5, 100.5, 1000.5])
_PROBES: Array = np.concatenate([-_FAR[::-1], _PROBE, _FAR])


def activation(name: str) -> Pointwise:
    """The function of a name in :data:`ACTIVATIONS`, whatever its case, blanks and punctuation.

    Raises:
        ValueError: No activation has this name.
    """
    known = {_letters(key): key for key in ACTIVATIONS}
    if _letters(name) in known:
        return ACTIVATIONS[known[_letters(name)]]
    near = difflib.get_close_matches(_letters(name), known, n=1)
    hint = f" (did you mean {known[near[0]]!r}?)" if near else ""
    raise ValueError(
        f"activation is {name!r}{hint}; allowed is a function of a tensor, or one of {', '.join(ACTIVATIONS)}"
    )


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def derivative_of(function: Pointwise) -> Function:
    """The derivative of a pointwise function of a tensor, by autograd in float64 on the CPU.

    Raises (when called):
        ValueError: The function fails, or is not pointwise; the message says which.
    """

    def derivative(x: Array) -> Array:
        with undisturbed():
            point = torch.from_numpy(np.ascontiguousarray(x)).requires_grad_()
            try:
                y = function(point * 1)  # not the leaf, which a function in place could not write to
                part = function(point.detach()[1::2].clone())
            except Exception as fault:  # whatever a user's function raises
                raise ValueError(f"the function cannot be evaluated on a float64 tensor: {fault}") from fault
            if not (isinstance(y, Tensor) and y.shape == point.shape and _same(y.detach()[1::2], part)):
                raise ValueError("the function is not pointwise: an output depends on more than its own input")
            if part.requires_grad:
                raise ValueError("the function reads trained tensors, whose gradient would be lost")
            if not y.requires_grad:
                return np.zeros(len(x))
            (gradient,) = torch.autograd.grad(y.sum(), point)
            return np.asarray(gradient.numpy(), dtype=np.float64)

    return derivative


def trace_derivative(function: Pointwise) -> Pointwise:
    """The derivative of a pointwise function in ATen operations, for tensors of any shape and device.

    It does not refer to ``function``, and may be traced in its turn.

    Args:
        function: Takes a float32 tensor; tensors that it closes over become constants.
    """

    def derivative(x: Tensor) -> Tensor:
        y = function(x * 1)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return gradient

    with undisturbed():
        example = torch.linspace(-1, 1, 6, dtype=torch.float32, device="cpu").view(2, 3).requires_grad_()
        return trace_for_all_shapes(derivative, example)


def writes_to_its_input(function: Pointwise) -> bool:
    """Whether a function works in place, as ``lambda x: x.mul_(2).tanh()`` does."""
    with undisturbed():
        x = torch.linspace(-1, 1, 6, device="cpu")
        before = version(x)
        function(x)
        return version(x) != before


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Autograd by itself, whatever goes on around: a trace, a transform, autocast, no_grad, hooks on saved tensors."""
    autocast = torch.autocast("cpu", enabled=False)
    anomaly = torch.autograd.set_detect_anomaly(False)  # its check for NaN would be traced
    with real_mode(), torch.inference_mode(False), torch.enable_grad(), autocast, neutral_hooks(), anomaly:
        yield


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal but for roundings: a vector loop and its remainder may round differently."""
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


def recognise(derivative: Function) -> str | None:
    """The name in :data:`ACTIVATIONS` whose derivative this is, to 1e-5, or None.

    Where several have it, such as hardshrink and softshrink, their names joined by "or".

    Args:
        derivative: Elementwise function of a float64 array.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        values = derivative(_PROBES)
    names = [name for name, theirs in _known_derivatives().items() if _is_one_function(values, theirs)]
    return " or ".join(names) or None


def _is_one_function(a: Array, b: Array) -> bool:
    """Equal at all probes, but for far ones at which the formula of one overflowed to NaN: they say nothing."""
    overflowed = (np.isnan(a) | np.isnan(b)) & np.isin(_PROBES, [-_FAR, _FAR])
    return bool(np.all(np.isclose(a, b, rtol=1e-5, atol=1e-5) | overflowed))


def is_affine(derivative: Function) -> bool:
    """Whether the derivative is a * x + b: then the site is a product, or a square, not an activation."""
    values = derivative(_PROBE)
    return bool(
        np.isfinite(values).all() and np.allclose(np.diff(values, 2), 0.0, atol=1e-9 * float(np.abs(values).max()))
    )


@functools.cache
def _known_derivatives() -> dict[str, Array]:
    return {name: derivative_of(f)(_PROBES) for name, f in ACTIVATIONS.items()}
