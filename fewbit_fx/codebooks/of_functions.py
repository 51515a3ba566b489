"""The codebook of a function, as a user asks for it; the backend and the drop-ins fit theirs in ``codec.scheme``."""

from __future__ import annotations

from torch import Tensor

from fewbit_fx.codebooks.activations import Pointwise, activation, derivative_of
from fewbit_fx.codebooks.density import Density, Observed, parse_density
from fewbit_fx.codebooks.fitting import Codebook, fit_codebook
from fewbit_fx.codebooks.sampling import Function, sample_derivative
from fewbit_fx.config import FewBitConfig
from fewbit_fx.function_cache import cached_per_function


def codebook(function: str | Pointwise, bits: int, density: Density | Tensor | str = "uniform") -> Codebook:
    """The optimal codebook of a function's derivative.

    Args:
        function: The name of an activation, such as ``"gelu"``, or any pointwise function of a tensor.
        bits: Bits per code, 1 to 8.
        density: How often each x is met: a density of :mod:`fewbit_fx.codebooks.density`, its text form, or a
            tensor of pre-activations. The backend itself uses ``"typical"``.

    Returns:
        Levels, boundaries (in values of the derivative) and error, all by that density.

    Raises:
        NotCodableError: A ValueError: the derivative is unbounded, undefined or constant where it
            varies. A density that says where x lies by itself (Normal, Observed, a fixed interval)
            also takes a derivative that is unbounded elsewhere.
        ValueError, TypeError: An unknown name, a function that is not pointwise, or a bad option.

    Examples:
        >>> import torch, fewbit_fx
        >>> book = fewbit_fx.codebook("gelu", 1)
        >>> [round(level, 3) for level in book.levels], round(book.relative_error, 2)
        ([0.001, 0.999], 0.21)
        >>> fewbit_fx.codebook(torch.relu, 3).levels  # as many as are exact
        (0.0, 1.0)
    """
    FewBitConfig(bits=bits)  # raises as every other use of the option does
    if isinstance(density, str):
        density = parse_density(density)
    if isinstance(density, Tensor):
        density = Observed(density)
    if isinstance(function, str):
        function = activation(function)
    if isinstance(density, Observed):  # not kept: a cache would keep the tensor
        return fit(derivative_of(function), bits, density)
    return _fitted(function, bits, density)


@cached_per_function
def _fitted(function: Pointwise, bits: int, density: Density) -> Codebook:
    return fit(derivative_of(function), bits, density)


def fit(derivative: Function, bits: int, density: Density) -> Codebook:
    """The codebook of a derivative that is given itself. Raises as :func:`codebook` does."""
    sample = sample_derivative(derivative, density)
    return fit_codebook(sample.values, sample.weights, bits)
