"""Few-bit codes of derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewbit_fx.codebooks.activations import is_affine
from fewbit_fx.codebooks.sampling import Function, NotCodableError, symmetric_grid
from fewbit_fx.codec.bitplanes import PlaneLayout
from fewbit_fx.codec.scheme import SCHEMES_BY_LEVELS, Scheme, fit_scheme, stochastic_scheme
from fewbit_fx.config import FewBitConfig
from fewbit_fx.torch_private.sizes import statically_known_true

from ..derivative import Derivative, NotEvaluableError
from ..graph import value_of
from ..reasons import Cause, Reason
from ..sites import DerivativeSite, Origin, Site
from .representation import Decision, Decode, Encode, Exact
from .stored_in_planes import StoredInPlanes

SWITCHED_OFF = Reason.of(Cause.SWITCHED_OFF, option="derivatives")
PRODUCT, LOSS, PERHAPS_LOSS = Reason(Cause.PRODUCT), Reason(Cause.LOSS), Reason(Cause.PERHAPS_LOSS)
_NEAR_ZERO = np.array([-1e-8, 1e-8])
_WIDE, _POINTS = 100.0, 1001
_NEARLY_NOTHING = 1e-3  # share of the largest derivative, less than the codes of any bits can tell from 0


@dataclass(frozen=True)
class EncodeDerivative(Encode):
    """x to the bit planes of the codes of f'(x), and to the levels where they are the tensor's own."""

    derivative: Derivative
    scheme: Scheme
    layout: PlaneLayout

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        """Whether codes are chosen at random."""
        return self.scheme.seeded

    def __call__(self, value: Tensor, *seed: Tensor) -> list[Tensor]:
        """The planes, int32, and levels, floating point."""
        return self.scheme.encode(value, self.derivative, self.layout, *seed)


@dataclass(frozen=True)
class MultiplyByLevel(Decode):
    """The entry gradient and the planes to the exit gradient, of a dtype."""

    scheme: Scheme
    layout: PlaneLayout
    dtype: torch.dtype

    def __call__(self, inputs: Sequence[Tensor], saved: Sequence[Tensor]) -> Tensor:
        """The exit gradient."""
        (gradient,) = inputs
        return self.scheme.decode(gradient, saved, self.layout, self.dtype)


@dataclass(frozen=True)
class DerivativeCodes(StoredInPlanes):
    """A few-bit code of f'(x) per element, that of a level near to it."""

    site: DerivativeSite
    scheme: Scheme
    form = "codes"

    @property
    def bits(self) -> int:
        """Bits per code."""
        return self.scheme.code_bits

    @property
    def nbytes(self) -> int:
        """Bytes of the planes and of the levels that are saved with them."""
        return super().nbytes + self.scheme.table_numel * max(self.value.dtype.itemsize, torch.float32.itemsize)

    @property
    def tensors(self) -> int:
        """Planes, and the levels where they are saved."""
        return super().tensors + (self.scheme.table_numel > 0)

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
        """Of the derivative, predicted for typical pre-activations."""
        return self.scheme.relative_error

    @property
    def levels(self) -> tuple[float, ...]:
        """The codebook's; none where levels are the tensor's own."""
        return self.scheme.levels


def _choice(config: FewBitConfig) -> Callable[[Function, int], Scheme]:
    return stochastic_scheme if config.rounding == "stochastic" else SCHEMES_BY_LEVELS[config.levels]


def propose_derivative_codes(site: Site, config: FewBitConfig) -> Decision | None:
    """Codes of the derivative, where it has a codebook that is good enough for what its data may be."""
    if not isinstance(site, DerivativeSite):
        return None
    if site.is_gate:
        return Exact(PRODUCT)
    if not config.derivatives:
        return Exact(SWITCHED_OFF)
    has_a_sample = statically_known_true(value_of(site.stored).numel() > 0)
    scheme = fitted_scheme(site.derivative, config.bits, _choice(config) if has_a_sample else fit_scheme)
    if isinstance(scheme, Exact):
        return scheme
    error = scheme.relative_error
    if not error <= config.max_relative_error:
        limit = config.max_relative_error
        return Exact(Reason.of(Cause.ERROR_TOO_LARGE, bits=config.bits, relative_error=error, max_relative_error=limit))
    if error > 0 and site.origin is Origin.BROADCAST:
        return Exact(LOSS)
    if site.origin is Origin.OUTSIDE and _vanishes_at_zero(site.derivative):
        return Exact(PERHAPS_LOSS)
    return DerivativeCodes(site, scheme)


@functools.lru_cache(maxsize=1024)  # layers share their derivative, and models their activations
def fitted_scheme(derivative: Derivative, bits: int, choose: Callable[[Function, int], Scheme]) -> Scheme | Exact:
    """How a derivative is coded, or why it cannot be; found once per derivative and process.

    Args:
        derivative: The derivative.
        bits: Bits per code.
        choose: What finds a scheme.
    """
    try:
        return choose(derivative.evaluated, bits)
    except NotCodableError as error:
        return Exact(PRODUCT if is_affine(derivative.evaluated) else Reason.of(Cause.NOT_CODABLE, problem=str(error)))
    except NotEvaluableError as error:
        return Exact(error.reason)


def _vanishes_at_zero(derivative: Derivative) -> bool:
    """Whether the relative error grows without bound as x goes to 0, where the residuals of a loss go."""
    largest = np.abs(derivative.evaluated(symmetric_grid(_WIDE, _POINTS))).max()
    return bool((np.abs(derivative.evaluated(_NEAR_ZERO)) < _NEARLY_NOTHING * largest).any())
