"""Decide for each site by itself how to represent it, asking the representations; what buys nothing ``gain`` drops."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence, Set

from torch.utils.checkpoint import CheckpointPolicy

from fewbit_fx.codec.bitplanes import plane_layout
from fewbit_fx.config import FewBitConfig
from fewbit_fx.torch_private.sizes import has_size_from_data, hint, size_symbols

from .graph import value_of
from .provenance import module_path
from .representations import PROPOSALS, Decision, Exact, Proposal
from .sites import Site

_RECOMPUTE = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
SIZE_FROM_DATA = "its size is known from data only, not when compiling"
SIZE_NOT_IN_BACKWARD = "its size follows from a number that the backward is not given"
EMPTY = "it has no elements"
RECOMPUTED = "activation checkpointing computes it again in the backward"
NO_FORM = "no representation is for a site of its kind"


def choose(
    site: Site, config: FewBitConfig, symbols: Set[object] = frozenset(), proposals: Sequence[Proposal] = ()
) -> Decision:
    """The representation of one site by itself; whether it buys memory shows only after the cut.

    Args:
        site: The site.
        config: The options.
        symbols: Those that the backward has as inputs. What follows from a code alone takes its size from them.
        proposals: Asked before our own.
    """
    reason = _skipped(site, config.skip) or _unsuitable(site, config.min_numel, symbols)
    if reason:
        return Exact(reason)
    answers = (propose(site, config) for propose in (*proposals, *PROPOSALS))
    return next((answer for answer in answers if answer is not None), Exact(NO_FORM))


def _skipped(site: Site, patterns: Sequence[str]) -> str:
    """Which pattern names the site's module; "" if none does."""
    path = module_path(site.anchor) if patterns else ""
    return next((f"the option skip has {p!r}" for p in patterns if fnmatch.fnmatchcase(path, p)), "")


def _unsuitable(site: Site, min_numel: int, symbols: Set[object]) -> str:
    """Why no representation suits a site, whatever it is; "" if one may."""
    value, stored = value_of(site.anchor), value_of(site.stored)
    if has_size_from_data(value):
        return SIZE_FROM_DATA
    if not site.coded_inputs and not size_symbols(value) <= symbols:
        return SIZE_NOT_IN_BACKWARD
    elements = hint(value.numel())
    if elements < min_numel:
        return f"it has {elements:,} elements, fewer than min_numel = {min_numel:,}"
    if elements == 0:
        return EMPTY
    if plane_layout(stored).has_an_empty_part(stored):
        return f"its size is symbolic, and its {elements:,} elements do not fill a block of bits"
    if any(n.meta.get("recompute") in _RECOMPUTE for n in (site.stored, *site.exact_inputs)):
        return RECOMPUTED
    return ""
