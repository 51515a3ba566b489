"""Decide for each site how to represent it: the choice, before any graph is touched."""

from __future__ import annotations

import functools
from collections.abc import Set

import numpy as np
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fewbit_fx.codebooks.activations import is_affine
from fewbit_fx.codebooks.sampling import NotCodableError
from fewbit_fx.codec.bitplanes import plane_layout
from fewbit_fx.codec.scheme import Coding, fit_coding
from fewbit_fx.config import FewBitConfig
from fewbit_fx.torch_private.sizes import has_size_from_data, hint, size_symbols

from .derivative import Derivative, NotEvaluableError
from .graph import value_of
from .representation import Coded, Exact, PackedMask, Representation
from .sites import DerivativeSite, MaskSite, Origin, Site, anchor

_RECOMPUTE = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
PRODUCT = "it is a product with a tensor, whose own values the backward needs"
LOSS = "it is the derivative of a loss, whose arguments go to where no level is near it"
PERHAPS_LOSS = (
    "its derivative vanishes as x goes to 0, and what its gradient comes from lies outside of the graph: perhaps a loss"
)
SIZE_FROM_DATA = "its size is known from data only, not when compiling"
SIZE_NOT_IN_BACKWARD = "its size follows from a number that the backward is not given"
EMPTY = "it has no elements"
_NEAR_ZERO = np.array([-1e-8, 1e-8])
_NEARLY_NOTHING = 1e-3  # share of the largest level, less than the codes of any bits can tell from 0


def choose(site: Site, config: FewBitConfig, symbols: Set[object] = frozenset()) -> Representation:
    """The representation of one site by itself; whether it buys memory shows only after the cut.

    Args:
        site: The site.
        config: The options.
        symbols: Those that the backward has as inputs. A mask is decoded from them; a gradient has its shape.
    """
    if has_size_from_data(value_of(anchor(site))):
        return Exact(SIZE_FROM_DATA)
    if isinstance(site, MaskSite) and not size_symbols(value_of(site.mask)) <= symbols:
        return Exact(SIZE_NOT_IN_BACKWARD)
    elements = hint(value_of(anchor(site)).numel())
    if elements < config.min_numel:
        return Exact(f"it has {elements:,} elements, fewer than min_numel = {config.min_numel:,}")
    if elements == 0:
        return Exact(EMPTY)
    stored = value_of(_forward_nodes(site)[0])
    if plane_layout(stored).has_an_empty_part(stored):
        return Exact(f"its size is symbolic, and its {elements:,} elements do not fill a block of bits")
    if any(n.meta.get("recompute") in _RECOMPUTE for n in _forward_nodes(site)):
        return Exact("activation checkpointing computes it again in the backward")
    if isinstance(site, MaskSite):
        return PackedMask() if config.masks else Exact("masks are switched off (masks=False)")
    if site.is_gate:
        return Exact(PRODUCT)
    if not config.derivatives:
        return Exact("derivatives are switched off (derivatives=False)")
    coding = fitted_coding(site.derivative, config.bits)
    if isinstance(coding, Exact):
        return coding
    error = coding.codebook.relative_error
    if not error <= config.max_relative_error:
        return Exact(
            f"{config.bits} bits would leave a relative error of {error:.0%}, "
            f"above max_relative_error = {config.max_relative_error:.0%}"
        )
    if error > 0 and site.origin is Origin.BROADCAST:
        return Exact(LOSS)
    if site.origin is Origin.OUTSIDE and _vanishes_at_zero(coding, site.derivative):
        return Exact(PERHAPS_LOSS)
    return Coded(coding)


def _vanishes_at_zero(coding: Coding, derivative: Derivative) -> bool:
    """Whether the relative error grows without bound as x goes to 0, where the residuals of a loss go."""
    largest = max(map(abs, coding.codebook.levels))
    return bool((np.abs(derivative.evaluated(_NEAR_ZERO)) < _NEARLY_NOTHING * largest).any())


def _forward_nodes(site: Site) -> tuple[fx.Node, ...]:
    return (site.source, *site.factors) if isinstance(site, DerivativeSite) else (site.mask,)


@functools.lru_cache(maxsize=1024)  # layers share their derivative, and models their activations
def fitted_coding(derivative: Derivative, bits: int) -> Coding | Exact:
    """The coding of a derivative, or why there is none; fitted once per derivative and process."""
    try:
        return fit_coding(derivative.evaluated, bits)
    except NotCodableError as reason:
        return Exact(PRODUCT if is_affine(derivative.evaluated) else str(reason))
    except NotEvaluableError as reason:
        return Exact(str(reason))
