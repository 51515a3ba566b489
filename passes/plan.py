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
from .reasons import Cause, Reason
from .representations import PROPOSALS, Decision, Exact, Proposal
from .sites import Site

_RECOMPUTE = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
SIZE_FROM_DATA, SIZE_NOT_IN_BACKWARD = Reason(Cause.SIZE_FROM_DATA), Reason(Cause.SIZE_NOT_IN_BACKWARD)
EMPTY, RECOMPUTED = Reason(Cause.EMPTY), Reason(Cause.RECOMPUTED)
NO_REPRESENTATION = Reason(Cause.NO_REPRESENTATION)


def choose(
    site: Site,
    config: FewBitConfig,
    symbols: Set[object] = frozenset(),
    proposals: Sequence[Proposal] = (),
    name: str = "",
) -> Decision:
    """The representation of one site by itself; whether it buys memory shows only after the cut.

    Args:
        site: The site.
        config: The options.
        symbols: The symbols of sizes that the backward has as inputs. What follows from a code alone takes its size
            from them.
        proposals: What is asked before our own representations.
        name: The name of the site, which the option ``skip`` may match.
    """
    reason = _skipped(site, name, config.skip) or _unsuitable(site, config.min_numel, symbols)
    if reason:
        return Exact(reason)
    answers = (propose(site, config) for propose in (*proposals, *PROPOSALS))
    return next((answer for answer in answers if answer is not None), Exact(NO_REPRESENTATION))


def _skipped(site: Site, name: str, patterns: Sequence[str]) -> Reason | None:
    """Which pattern matches the site's module or name; None if none does."""
    texts = (module_path(site.anchor), name) if patterns else ()
    found = (p for p in patterns if any(fnmatch.fnmatchcase(text, p) for text in texts))
    return next((Reason.of(Cause.SKIPPED, pattern=p) for p in found), None)


def _unsuitable(site: Site, min_numel: int, symbols: Set[object]) -> Reason | None:
    """Why no representation suits a site, whatever it is; None if one may."""
    value, stored = value_of(site.anchor), value_of(site.stored)
    if has_size_from_data(value):
        return SIZE_FROM_DATA
    if not site.coded_inputs and not size_symbols(value) <= symbols:
        return SIZE_NOT_IN_BACKWARD
    elements = hint(value.numel())
    if elements < min_numel:
        return Reason.of(Cause.TOO_FEW_ELEMENTS, elements=elements, min_numel=min_numel)
    if elements == 0:
        return EMPTY
    if plane_layout(stored).has_an_empty_part(stored):
        return Reason.of(Cause.NO_FULL_BLOCK, elements=elements)
    if any(n.meta.get("recompute") in _RECOMPUTE for n in (site.stored, *site.exact_inputs)):
        return RECOMPUTED
    return None
