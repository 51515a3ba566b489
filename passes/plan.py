"""Decide for each site how to represent it: the choice, before any graph is touched."""

from __future__ import annotations

import functools

from fewbit_fx.passes.derivative import Derivative
from fewbit_fx.passes.graph import value_of
from fewbit_fx.passes.representation import Coded, Exact, PackedMask, Representation
from fewbit_fx.passes.sites import DerivativeSite, MaskSite, Site, anchor
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fewbit_fx._torch import hint
from fewbit_fx.coding import Coding, fit_coding
from fewbit_fx.config import FewBitConfig
from fewbit_fx.functions import is_affine
from fewbit_fx.sampling import NotCodableError

_RECOMPUTE = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
PRODUCT = "it is a product with a tensor, whose own values the backward needs"


def choose(site: Site, config: FewBitConfig) -> Representation:
    """The representation of one site by itself; whether it buys memory shows only after the cut."""
    elements = hint(value_of(anchor(site)).numel())
    if elements < config.min_numel:
        return Exact(f"it has {elements:,} elements, fewer than min_numel = {config.min_numel:,}")
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
    return Coded(coding)


def _forward_nodes(site: Site) -> tuple[fx.Node, ...]:
    return (site.source, *site.factors) if isinstance(site, DerivativeSite) else (site.mask,)


@functools.lru_cache(maxsize=1024)  # layers share their derivative, and models their activations
def fitted_coding(derivative: Derivative, bits: int) -> Coding | Exact:
    """The coding of a derivative, or why there is none; fitted once per derivative and process."""
    try:
        return fit_coding(derivative.ideal, bits)
    except NotCodableError as reason:
        return Exact(PRODUCT if is_affine(derivative.ideal) else str(reason))
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as fault:  # whatever an operation may raise
        return Exact(f"its derivative cannot be evaluated: {fault}")
