"""Names for derivatives: which of torch's activations has this one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit_fx._torch import real_mode
from fewbit_fx.codebook import Array
from fewbit_fx.sampling import Function

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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
    "selu": F.selu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky relu": F.leaky_relu,
    "hard/softshrink": F.hardshrink,  # one derivative
    "atan": torch.atan,
    "squared relu": lambda x: torch.relu(x) ** 2,
    "exp": torch.exp,
    "square": torch.square,
}

# Off the kinks of the piecewise functions, wide enough to tell each from the others.
_PROBE: Array = np.linspace(-7.93, 7.97, 160)


def recognise(derivative: Function) -> str | None:
    """The name in :data:`ACTIVATIONS` whose derivative this is, to 1e-5, or None.

    Args:
        derivative: Elementwise function of a float64 array.
    """
    values = derivative(_PROBE)
    for name, known in _known_derivatives().items():
        if np.allclose(values, known, rtol=1e-5, atol=1e-5):
            return name
    return None


def is_affine(derivative: Function) -> bool:
    """Whether the derivative is a * x + b: then the site is a product, or a square, not an activation."""
    values = derivative(_PROBE)
    return bool(np.allclose(np.diff(values, 2), 0.0, atol=1e-9 * max(1.0, float(np.abs(values).max()))))


@functools.cache
def _known_derivatives() -> dict[str, Array]:
    return {name: _derivative_by_autograd(f) for name, f in ACTIVATIONS.items()}


def _derivative_by_autograd(function: Callable[[Tensor], Tensor]) -> Array:
    with real_mode(), torch.inference_mode(False), torch.enable_grad():
        x = torch.from_numpy(_PROBE).requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).sum(), x)
        return np.asarray(gradient.numpy(), dtype=np.float64)
