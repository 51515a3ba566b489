"""Few-bit codes of derivatives."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewbit_fx.codebooks.activations import is_affine
from fewbit_fx.codebooks.sampling import NotCodableError
from fewbit_fx.codec.bitplanes import PlaneLayout, plane_layout
from fewbit_fx.codec.encode_decode import decode_and_multiply, encode
from fewbit_fx.codec.scheme import CodingScheme, fit_scheme
from fewbit_fx.config import FewBitConfig

from ..derivative import Derivative, NotEvaluableError
from ..graph import value_of
from ..reasons import Cause, Reason
from ..sites import DerivativeSite, Origin, Site
from .representation import Decision, Decode, Encode, Exact, Representation

SWITCHED_OFF = Reason.of(Cause.SWITCHED_OFF, option="derivatives")
PRODUCT, LOSS, PERHAPS_LOSS = Reason(Cause.PRODUCT), Reason(Cause.LOSS), Reason(Cause.PERHAPS_LOSS)
_NEAR_ZERO = np.array([-1e-8, 1e-8])
_NEARLY_NOTHING = 1e-3  # share of the largest level, less than the codes of any bits can tell from 0


@dataclass(frozen=True)
class EncodeDerivative(Encode):
    """x to the bit planes of the codes of f'(x)."""

    derivative: Derivative
    coding: CodingScheme
    layout: PlaneLayout

    def __call__(self, value: Tensor) -> list[Tensor]:
        """The planes, int32."""
        coding = self.coding
        bits = functools.partial(coding.bits, derivative=self.derivative)
        return encode(value, bits, self.layout, coding.guarded, coding.mirrored)


@dataclass(frozen=True)
class MultiplyByLevel(Decode):
    """The entry gradient and the planes to the exit gradient, of a dtype."""

    coding: CodingScheme
    layout: PlaneLayout
    dtype: torch.dtype

    def __call__(self, inputs: Sequence[Tensor], saved: Sequence[Tensor]) -> Tensor:
        """The exit gradient."""
        (gradient,) = inputs
        guarded, mirrored, levels = self.coding.guarded, self.coding.mirrored, self.coding.codebook.levels
        return decode_and_multiply(gradient, saved, levels, self.layout, self.dtype, guarded=guarded, mirrored=mirrored)


@dataclass(frozen=True)
class DerivativeCodes(Representation):
    """A few-bit code of f'(x) per element, that of the nearest of the codebook's levels."""

    site: DerivativeSite
    coding: CodingScheme
    form = "codes"

    @property
    def bits(self) -> int:
        """The codebook's."""
        return self.coding.codebook.bits

    @property
    def nbytes(self) -> int:
        """Bytes of all the planes."""
        return self.bits * self._layout.nbytes(self._x)

    @property
    def tensors(self) -> int:
        """How many planes there are."""
        return self.bits * self._layout.parts(self._x)

    @property
    def encode(self) -> EncodeDerivative:
        """Encode f'(x)."""
        return EncodeDerivative(self.site.derivative, self.coding, self._layout)

    @property
    def decode(self) -> MultiplyByLevel:
        """Multiply the gradient by the level."""
        return MultiplyByLevel(self.coding, self._layout, value_of(self.site.exit).dtype)

    @property
    def relative_error(self) -> float:
        """Of the derivative, over the codebook's density."""
        return self.coding.codebook.relative_error

    @property
    def levels(self) -> tuple[float, ...]:
        """The codebook's."""
        return self.coding.codebook.levels

    @property
    def _x(self) -> Tensor:
        x: Tensor = value_of(self.site.source)
        return x

    @property
    def _layout(self) -> PlaneLayout:
        return plane_layout(self._x)


def propose_derivative_codes(site: Site, config: FewBitConfig) -> Decision | None:
    """Codes of the derivative, where it has a codebook that is good enough for what its data may be."""
    if not isinstance(site, DerivativeSite):
        return None
    if site.is_gate:
        return Exact(PRODUCT)
    if not config.derivatives:
        return Exact(SWITCHED_OFF)
    coding = fitted_scheme(site.derivative, config.bits)
    if isinstance(coding, Exact):
        return coding
    error = coding.codebook.relative_error
    if not error <= config.max_relative_error:
        limit = config.max_relative_error
        return Exact(Reason.of(Cause.ERROR_TOO_LARGE, bits=config.bits, relative_error=error, max_relative_error=limit))
    if error > 0 and site.origin is Origin.BROADCAST:
        return Exact(LOSS)
    if site.origin is Origin.OUTSIDE and _vanishes_at_zero(coding, site.derivative):
        return Exact(PERHAPS_LOSS)
    return DerivativeCodes(site, coding)


@functools.lru_cache(maxsize=1024)  # layers share their derivative, and models their activations
def fitted_scheme(derivative: Derivative, bits: int) -> CodingScheme | Exact:
    """The coding of a derivative, or why there is none; fitted once per derivative and process."""
    try:
        return fit_scheme(derivative.evaluated, bits)
    except NotCodableError as error:
        return Exact(PRODUCT if is_affine(derivative.evaluated) else Reason.of(Cause.NOT_CODABLE, problem=str(error)))
    except NotEvaluableError as error:
        return Exact(error.reason)


def _vanishes_at_zero(coding: CodingScheme, derivative: Derivative) -> bool:
    """Whether the relative error grows without bound as x goes to 0, where the residuals of a loss go."""
    largest = max(map(abs, coding.codebook.levels))
    return bool((np.abs(derivative.evaluated(_NEAR_ZERO)) < _NEARLY_NOTHING * largest).any())
