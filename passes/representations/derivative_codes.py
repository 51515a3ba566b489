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
from fewbit_fx.codec.bitplanes import PlaneLayout
from fewbit_fx.codec.encode_decode import decode_and_multiply, encode
from fewbit_fx.codec.scheme import CodingScheme, fit_scheme
from fewbit_fx.config import FewBitConfig

from ..derivative import Derivative, NotEvaluableError
from ..graph import value_of
from ..reasons import Cause, Reason
from ..sites import DerivativeSite, Origin, Site
from .representation import Decision, Decode, Encode, Exact
from .stored_in_planes import StoredInPlanes

SWITCHED_OFF = Reason.of(Cause.SWITCHED_OFF, option="derivatives")
PRODUCT, LOSS, PERHAPS_LOSS = Reason(Cause.PRODUCT), Reason(Cause.LOSS), Reason(Cause.PERHAPS_LOSS)
_NEAR_ZERO = np.array([-1e-8, 1e-8])
_NEARLY_NOTHING = 1e-3  # share of the largest level, less than the codes of any bits can tell from 0


@dataclass(frozen=True)
class EncodeDerivative(Encode):
    """x to the bit planes of the codes of f'(x)."""

    derivative: Derivative
    scheme: CodingScheme
    layout: PlaneLayout

    def __call__(self, value: Tensor) -> list[Tensor]:
        """The planes, int32."""
        scheme = self.scheme
        bits = functools.partial(scheme.bits, derivative=self.derivative)
        return encode(value, bits, self.layout, scheme.guarded, scheme.mirrored)


@dataclass(frozen=True)
class MultiplyByLevel(Decode):
    """The entry gradient and the planes to the exit gradient, of a dtype."""

    scheme: CodingScheme
    layout: PlaneLayout
    dtype: torch.dtype

    def __call__(self, inputs: Sequence[Tensor], saved: Sequence[Tensor]) -> Tensor:
        """The exit gradient."""
        (gradient,) = inputs
        guarded, mirrored, levels = self.scheme.guarded, self.scheme.mirrored, self.scheme.codebook.levels
        return decode_and_multiply(gradient, saved, levels, self.layout, self.dtype, guarded=guarded, mirrored=mirrored)


@dataclass(frozen=True)
class DerivativeCodes(StoredInPlanes):
    """A few-bit code of f'(x) per element, that of the nearest of the codebook's levels."""

    site: DerivativeSite
    scheme: CodingScheme
    form = "codes"

    @property
    def bits(self) -> int:
        """The codebook's."""
        return self.scheme.codebook.bits

    @property
    def encode(self) -> EncodeDerivative:
        """Encode f'(x)."""
        return EncodeDerivative(self.site.derivative, self.scheme, self.layout)

    @property
    def decode(self) -> MultiplyByLevel:
        """Multiply the gradient by the level."""
        return MultiplyByLevel(self.scheme, self.layout, value_of(self.site.exit).dtype)

    @property
    def relative_error(self) -> float:
        """The codebook's: of the derivative, over the density that it was fitted for."""
        return self.scheme.codebook.relative_error

    @property
    def levels(self) -> tuple[float, ...]:
        """The codebook's."""
        return self.scheme.codebook.levels


def propose_derivative_codes(site: Site, config: FewBitConfig) -> Decision | None:
    """Codes of the derivative, where it has a codebook that is good enough for what its data may be."""
    if not isinstance(site, DerivativeSite):
        return None
    if site.is_gate:
        return Exact(PRODUCT)
    if not config.derivatives:
        return Exact(SWITCHED_OFF)
    scheme = fitted_scheme(site.derivative, config.bits)
    if isinstance(scheme, Exact):
        return scheme
    error = scheme.codebook.relative_error
    if not error <= config.max_relative_error:
        limit = config.max_relative_error
        return Exact(Reason.of(Cause.ERROR_TOO_LARGE, bits=config.bits, relative_error=error, max_relative_error=limit))
    if error > 0 and site.origin is Origin.BROADCAST:
        return Exact(LOSS)
    if site.origin is Origin.OUTSIDE and _vanishes_at_zero(scheme, site.derivative):
        return Exact(PERHAPS_LOSS)
    return DerivativeCodes(site, scheme)


@functools.lru_cache(maxsize=1024)  # layers share their derivative, and models their activations
def fitted_scheme(derivative: Derivative, bits: int) -> CodingScheme | Exact:
    """How a derivative is coded, or why it cannot be; fitted once per derivative and process."""
    try:
        return fit_scheme(derivative.evaluated, bits)
    except NotCodableError as error:
        return Exact(PRODUCT if is_affine(derivative.evaluated) else Reason.of(Cause.NOT_CODABLE, problem=str(error)))
    except NotEvaluableError as error:
        return Exact(error.reason)


def _vanishes_at_zero(scheme: CodingScheme, derivative: Derivative) -> bool:
    """Whether the relative error grows without bound as x goes to 0, where the residuals of a loss go."""
    largest = max(map(abs, scheme.codebook.levels))
    return bool((np.abs(derivative.evaluated(_NEAR_ZERO)) < _NEARLY_NOTHING * largest).any())
