"""How a derivative is coded: its codebook, and whether its codes come from x or from the values of f'."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fewbit_fx.codebooks.density import Typical
from fewbit_fx.codebooks.fitting import Codebook, fit_codebook, is_mirrored
from fewbit_fx.codebooks.sampling import Function, Sample, sample_derivative, symmetric_grid
from fewbit_fx.codebooks.thresholds import EXACT, Thresholds, find_thresholds, has_jumps
from fewbit_fx.codec.bitplanes import PlaneLayout
from fewbit_fx.codec.encode_decode import (
    at_least_float32,
    bits_by_threshold,
    bits_by_value,
    decode_and_multiply,
    encode,
    takes_signs,
)
from fewbit_fx.codec.nonfinite import Undefined, find_undefined, is_finite
from fewbit_fx.codec.sampled_levels import Axis, SampledScheme
from fewbit_fx.codec.stochastic_levels import StochasticScheme
from fewbit_fx.config import MOST_BITS_OF_SAMPLED_LEVELS, FewBitConfig
from fewbit_fx.torch_private.modes import real_mode

_INFINITY = np.float32(np.inf)
_FAR, _POINTS = 1e3, 4097  # of the grid on which a symmetry is looked for
_ALIKE = 1e-6  # relative to the largest derivative
_FINEST = 2**14  # points that stand for the density of typical x
_MUCH_WORSE = 1.25  # times the error of the codebook
_LEAST_MIRRORED = 3  # bits: beside the side of 0, a word that is marked takes two


@dataclass(frozen=True)
class CodingScheme:
    """How a derivative is coded.

    Attributes:
        codebook: Its levels.
        thresholds: Where on the x axis the code changes; None if codes come from the values of f'.
        undefined: Which of NaN and the infinities have a derivative that is not finite; None if none has.
        mirrored: Half of the levels follow from the others (``fitting.is_mirrored``).
    """

    codebook: Codebook
    thresholds: Thresholds | None
    undefined: Undefined | None
    mirrored: bool = False

    table_numel = 0  # nothing is saved beside the planes
    seeded = False

    @property
    def code_bits(self) -> int:
        """Bits per code."""
        return self.codebook.bits

    @property
    def levels(self) -> tuple[float, ...]:
        """The codebook's."""
        return self.codebook.levels

    @property
    def relative_error(self) -> float:
        """The codebook's: root mean square of (level - f'(x)) over that of f'(x), for typical pre-activations."""
        return self.codebook.relative_error

    def encode(self, x: Tensor, derivative: Callable[[Tensor], Tensor], layout: PlaneLayout) -> list[Tensor]:
        """The planes of the codes of f'(x).

        Args:
            x: Tensor of any shape and floating point dtype.
            derivative: f', elementwise, for tensors of the dtype of x.
            layout: Of the planes.
        """
        return encode(x, functools.partial(self.bits, derivative=derivative), layout, self.guarded, self.mirrored)

    def decode(
        self,
        gradient: Tensor,
        saved: Sequence[Tensor],
        layout: PlaneLayout,
        dtype: torch.dtype,
        product: Callable[[Tensor, Tensor], Tensor] = torch.mul,
    ) -> Tensor:
        """``gradient * level`` by a product, of a dtype; ``saved`` and ``layout`` as for :meth:`encode`."""
        levels = self.codebook.levels
        return decode_and_multiply(gradient, saved, levels, layout, dtype, product, self.guarded, self.mirrored)

    @property
    def guarded(self) -> bool:
        """Whether codes tell what is not finite (``codec/nonfinite.py``)."""
        return self.undefined is not None

    def bits(self, x: Tensor, derivative: Callable[[Tensor], Tensor], compiled: bool = True) -> list[Tensor]:
        """The bits of the codes of f'(x), the most significant first. Where guarded, a last one says what is finite.

        Args:
            x: The tensor to encode, of any shape and dtype.
            derivative: The function f', elementwise.
            compiled: Whether Inductor compiles these operations.
        """
        if self.thresholds is None:
            values = at_least_float32(derivative(x))
            bits = bits_by_value(values, self.codebook.levels)
            return [*bits, is_finite(values)] if self.guarded else bits
        bits = bits_by_threshold(x, self.thresholds, compiled)
        if self.undefined is None:
            return bits
        return [*bits, self.undefined.spares(at_least_float32(x), takes_signs(x, compiled))]


NearestScheme = CodingScheme | SampledScheme
Scheme = NearestScheme | StochasticScheme


def fit_scheme(derivative: Function, bits: int) -> CodingScheme:
    """Fit the codebook of a derivative, by what pre-activations typically are.

    Raises:
        NotCodableError: The derivative is unbounded, undefined or constant.
        ValueError, TypeError: ``bits`` is not allowed.
    """
    return _fit_to(derivative, sample_derivative(derivative, Typical()), bits)


def _fit_to(derivative: Function, typical: Sample, bits: int) -> CodingScheme:
    FewBitConfig(bits=bits)
    book = fit_codebook(typical.values, typical.weights, bits)
    thresholds = find_thresholds(derivative, book, typical.x)
    return CodingScheme(book, thresholds, find_undefined(derivative), is_mirrored(book.levels))


def choose_scheme(derivative: Function, bits: int) -> NearestScheme:
    """Levels from a sample of each tensor; those of a codebook where that is exact, and for more than 4 bits.

    Raises as :func:`fit_scheme` does.
    """
    typical = sample_derivative(derivative, Typical())
    fixed = _fit_to(derivative, typical, bits)
    if bits > MOST_BITS_OF_SAMPLED_LEVELS or fixed.relative_error < EXACT:
        return fixed
    axis, centre = _symmetry_of(derivative, bits)
    axes = [Axis.DERIVATIVE] if has_jumps(derivative, typical.x) else [axis, Axis.DERIVATIVE]
    for axis in axes:
        sampled = SampledScheme(
            bits, axis, centre.as_integer_ratio() if axis is Axis.SIDES else (0, 1), fixed.undefined, math.inf
        )
        error = _error_for(sampled, derivative, typical)
        if error <= _MUCH_WORSE * fixed.relative_error:
            return replace(sampled, relative_error=error)
    return fixed


SCHEMES_BY_LEVELS: Mapping[str, Callable[[Function, int], NearestScheme]] = {
    "sampled": choose_scheme,
    "typical": fit_scheme,
}
"""How a scheme is chosen, by the option ``levels``."""


def stochastic_scheme(derivative: Function, bits: int) -> Scheme:
    """Levels between which values are rounded at random; a codebook where that is exact.

    Raises as :func:`fit_scheme` does.
    """
    typical = sample_derivative(derivative, Typical())
    fixed = _fit_to(derivative, typical, bits)
    if fixed.relative_error < EXACT:
        return fixed
    values = np.concatenate([typical.values, derivative(symmetric_grid(_FAR, _POINTS))])
    low, high = np.nextafter(np.float32(values.min()), -_INFINITY), np.nextafter(np.float32(values.max()), _INFINITY)
    scheme = StochasticScheme(bits, (float(low), float(high)), fixed.guarded, math.inf)
    x, of_tensor = _typical_tensor(typical), _on_tensors(derivative)
    with real_mode(), torch.no_grad():
        exact, levels = of_tensor(x), scheme.fit(x, of_tensor)
        above = torch.bucketize(exact, levels).clamp(1, len(levels) - 1)
        variance = (exact - levels[above - 1]) * (levels[above] - exact)  # of a choice between two, by their distances
        return replace(scheme, relative_error=float(variance.sum().sqrt() / exact.norm()))


def _symmetry_of(derivative: Function, bits: int) -> tuple[Axis, float]:
    """The axis of x that a derivative needs, and the sum of its sides where it has one."""
    x = symmetric_grid(_FAR, _POINTS)
    left, right = derivative(-x), derivative(x)
    allowed = _ALIKE * float(np.abs(right).max())
    centre = float(np.float32(left[-1] + right[-1]))
    if np.abs(left - right).max() <= allowed:
        return Axis.MAGNITUDE, 0.0
    if bits >= _LEAST_MIRRORED and np.abs(left + right - centre).max() <= allowed:
        return Axis.SIDES, centre
    return Axis.X, 0.0


def _error_for(scheme: SampledScheme, derivative: Function, typical: Sample) -> float:
    """The relative error for a tensor of typical pre-activations."""
    x, of_tensor = _typical_tensor(typical), _on_tensors(derivative)
    with real_mode(), torch.no_grad():
        exact = of_tensor(x)
        return float((scheme.coded(x, of_tensor) - exact).norm() / exact.norm())


def _typical_tensor(typical: Sample) -> Tensor:
    """As many x of each kind as the weights say."""
    shares = (np.arange(_FINEST) + 0.5) / _FINEST
    positions = np.searchsorted(np.cumsum(typical.weights), shares).clip(max=len(typical.x) - 1)
    with real_mode():
        return torch.from_numpy(typical.x[positions])


def _on_tensors(derivative: Function) -> Callable[[Tensor], Tensor]:
    return lambda points: torch.from_numpy(np.array(derivative(points.numpy())))
