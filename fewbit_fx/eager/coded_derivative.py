"""What the drop-in functions and modules know of a pointwise function: how to code its derivative."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit_fx.codebooks.activations import Pointwise, derivative_of, trace_derivative, undisturbed, writes_to_its_input
from fewbit_fx.codebooks.sampling import NotCodableError
from fewbit_fx.codec.encode_decode import at_least_float32
from fewbit_fx.codec.scheme import SCHEMES_BY_LEVELS, NearestScheme
from fewbit_fx.config import FewBitConfig
from fewbit_fx.eager.kernels import Encoder
from fewbit_fx.function_cache import cached_per_function, owner_of


@dataclass(frozen=True)
class Activation:
    """A function of torch.nn.functional with its arguments; equal ones are interchangeable.

    Attributes:
        name: The name of the function in torch.nn.functional.
        arguments: All but the first, as pairs of keyword and value.
    """

    name: str
    arguments: tuple[tuple[str, float | str], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """The function's value."""
        result: Tensor = getattr(F, self.name)(x, **dict(self.arguments))
        return result

    def thresholds(self) -> dict[str, float]:
        """The arguments that x is compared with; a float off, and the bit of an element is wrong."""
        return {k: float(v) for k, v in self.arguments if k in _THRESHOLDS.get(self.name, ())}

    def rounded(self, dtype: torch.dtype) -> Activation:
        """The activation with its thresholds rounded to a dtype."""
        rounded = {k: torch.tensor(v, dtype=dtype).item() for k, v in self.thresholds().items()}
        return Activation(self.name, tuple({**dict(self.arguments), **rounded}.items()))


_THRESHOLDS = {
    "hardtanh": ("min_val", "max_val"),
    "hardshrink": ("lambd",),
    "softshrink": ("lambd",),
}


@dataclass(frozen=True, eq=False)
class CodedDerivative:
    """The few-bit form of a function's derivative. It does not refer to the function.

    Attributes:
        encoder: What encodes the derivative.
        in_place: Whether the function writes to its input. It is given a copy then.
    """

    encoder: Encoder
    in_place: bool = False

    @property
    def derivative(self) -> Pointwise:
        """f', in float32 or float64."""
        return self.encoder.derivative

    @property
    def scheme(self) -> NearestScheme:
        """How f' is coded."""
        return self.encoder.scheme

    def value(self, function: Pointwise, x: Tensor) -> Tensor:
        """``function(x)``, with x left as it is.

        Dynamo of torch 2.11 loses the gradient of what an in-place operation returned, but not that of a copy.
        """
        return function(x.clone()).clone() if self.in_place else function(x)


@cached_per_function
def coded_function(function: Pointwise, bits: int, levels: str) -> CodedDerivative:
    """The few-bit form of any pointwise function. Raises as :func:`fewbit_fx.codebook` does."""
    scheme = SCHEMES_BY_LEVELS[FewBitConfig(levels=levels).levels](derivative_of(function), bits)
    return CodedDerivative(Encoder(trace_derivative(function), scheme), writes_to_its_input(function))


def coded_activation(
    activation: Activation, bits: int, levels: str, dtype: torch.dtype, device: torch.device
) -> CodedDerivative | None:
    """The few-bit form of an activation for eager tensors of a dtype and device; None if it has none."""
    return _coded_activation(activation, bits, levels, *((dtype, device.type) if activation.thresholds() else ()))


@functools.lru_cache(maxsize=1024)
def _coded_activation(
    activation: Activation, bits: int, levels: str, dtype: torch.dtype | None = None, device: str = "cpu"
) -> CodedDerivative | None:
    try:
        scheme = SCHEMES_BY_LEVELS[levels](derivative_of(activation), bits)
    except NotCodableError:
        return None
    compared = activation if dtype is None else _as_compared(activation, dtype, device)
    return None if compared is None else CodedDerivative(Encoder(trace_derivative(compared), scheme))


def _as_compared(activation: Activation, dtype: torch.dtype, device: str) -> Activation | None:
    """The activation with the thresholds that torch's own kernel compares with.

    Some kernels round a threshold to the tensor's dtype and some widen the tensor. Which, they are asked
    themselves, at the numbers next to each threshold; None if neither explains what they say.
    """
    steps = torch.arange(-4.0, 5.0, dtype=torch.float64) * torch.finfo(dtype).eps / 2
    edges = [sign * v * (1 + steps) for v in activation.thresholds().values() for sign in (-1, 1)]
    with undisturbed():
        x = torch.cat(edges).to(device if device != "meta" else "cpu", dtype).requires_grad_()
        (own,) = torch.autograd.grad(activation(x).sum(), x)
        for candidate in (activation.rounded(dtype), activation):
            if torch.equal(trace_derivative(candidate)(at_least_float32(x.detach())).to(dtype), own):
                return candidate
    return None


# Dynamo cannot hold the result of a function that it does not trace, unless that is a constant. It can read an
# attribute of a global object, whose name is such a constant.
NAMED = SimpleNamespace()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]  # Dynamo is not to trace the fit
def name_of_activation(name: str, arguments: tuple[tuple[str, float | str], ...], bits: int, levels: str) -> str | None:
    """The attribute of :data:`NAMED` that is the few-bit form of an activation; None if it has none."""
    coded = _coded_activation(Activation(name, arguments), bits, levels)
    return None if coded is None else _named(coded)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]
def name_of_function(function: Pointwise, bits: int, levels: str) -> str:
    """The attribute of :data:`NAMED` that is the few-bit form of a function, while that lives."""
    name = _named(coded_function(function, bits, levels))
    weakref.finalize(owner_of(function), vars(NAMED).pop, name, None)
    return name


def _named(coded: CodedDerivative) -> str:
    name = f"coded_{id(coded)}"
    setattr(NAMED, name, coded)
    return name
