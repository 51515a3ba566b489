"""Words for what the passes record as data."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fewbit_fx.passes.reasons import Cause, Reason
from fewbit_fx.passes.record import SiteRecord

LEFT_EXACT = "left exact"

# Each completes the sentence "left exact, because ...".
_BECAUSE = {
    Cause.SKIPPED: "the option skip has {pattern!r}",
    Cause.SWITCHED_OFF: "{option} are switched off ({option}=False)",
    Cause.DISABLED: "the option disable has {name!r}",
    Cause.TOO_FEW_ELEMENTS: "it has {elements:,} elements, fewer than min_numel = {min_numel:,}",
    Cause.EMPTY: "it has no elements",
    Cause.SIZE_FROM_DATA: "its size is known from data only, not when compiling",
    Cause.SIZE_NOT_IN_BACKWARD: "its size follows from a number that the backward is not given",
    Cause.NO_FULL_BLOCK: "its size is symbolic, and its {elements:,} elements do not fill a block of bits",
    Cause.RECOMPUTED: "activation checkpointing computes it again in the backward",
    Cause.RENAMED: "torch names it anew, to save the state of a random number generator before it",
    Cause.EXACT_BY_OPTION: "the option {option} is None",
    Cause.DTYPE: "its dtype {dtype} has a wider range than the scales of codes",
    Cause.DATA: "it is data, which the caller keeps",
    Cause.INTEGER: "it holds whole numbers",
    Cause.DECIDES: "the backward decides by it, and would decide otherwise near the threshold",
    Cause.WEIGHT: "it follows from parameters and buffers alone",
    Cause.STATISTIC: "it is a statistic, which many elements are computed from",
    Cause.ROTATED: "keys that are rotated after a bias was added may be much larger than what attention tells apart",
    Cause.NO_REPRESENTATION: "no representation is for a site of its kind",
    Cause.PRODUCT: "it is a product with a tensor, whose own values the backward needs",
    Cause.LOSS: "it is the derivative of a loss, whose arguments go to where no level is near it",
    Cause.PERHAPS_LOSS: (
        "its derivative vanishes as x goes to 0, and what its gradient comes from lies outside of the graph: "
        "perhaps a loss"
    ),
    Cause.ERROR_TOO_LARGE: (
        "{bits} bits would leave a relative error of {relative_error:.0%}, "
        "above max_relative_error = {max_relative_error:.0%}"
    ),
    Cause.NOT_CODABLE: "{problem}",
    Cause.NOT_EVALUABLE: "its derivative cannot be evaluated: {problem}",
    Cause.UNKNOWN_INPUT: "it depends on {node}, which is not known when compiling",
    Cause.NOT_SAVED: "torch.compile saves nothing for it that does not live anyway",
    Cause.NEEDED: "the backward needs its exact value for something else too, so a code would save nothing",
    Cause.RETURNED: "the graph returns what it follows from to its caller, where it may live on",
    Cause.CODE_NOT_SMALLER: "a code would be no smaller than what torch.compile saves for it",
    Cause.GRAPHS_NOT_SMALLER: "the rewritten graphs came out no smaller, so torch.compile's own are kept",
    Cause.FAULT: "of a fault there: {fault}",
}

# What a representation does, by its form.
_ACTIONS = {
    "codes": "coded in {bits} bit{s}",
    "values": "values in {bits} bits",
    "mask": "exact one-bit mask",
}
_OTHER_ACTION = "stored as {form} in {bits} bit{s}"


@dataclass(frozen=True)
class ReportedSite(SiteRecord):
    """A site's record as a report shows it.

    Attributes:
        action: What happened: ``coded in 3 bits``, ``exact one-bit mask``, ``left exact`` and their kind.
        reason: What completes the sentence "left exact, because ..."; "" if it was not left exact.
        cause: The kind of reason, which a program should compare; "" if it was not left exact.
    """

    reason: str  # type: ignore[assignment]  # in the place of the record's data
    action: str = ""
    cause: str = ""


def in_words(site: SiteRecord) -> ReportedSite:
    """The record of a site with its sentences."""
    data = {f.name: getattr(site, f.name) for f in fields(SiteRecord)}
    cause = site.reason.cause.value if site.reason else ""
    return ReportedSite(**{**data, "reason": because(site.reason)}, action=action(site), cause=cause)


def because(reason: Reason | None) -> str:
    """What completes the sentence "left exact, because ..."; "" without a reason."""
    return _BECAUSE[reason.cause].format(**dict(reason.details)) if reason else ""


def action(site: SiteRecord) -> str:
    """What happened to a site: ``coded in 3 bits``, ``exact one-bit mask``, ``left exact`` and their kind."""
    if site.is_exact:
        return LEFT_EXACT
    template = _ACTIONS.get(site.form, _OTHER_ACTION)
    return template.format(form=site.form, bits=site.bits, s="" if site.bits == 1 else "s")
