"""Why a site, a region or a graph is left exact, as data; a report makes words of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

Detail = int | float | str


class Cause(str, Enum):
    """The kinds of reasons. The comment behind each names the details that go with it."""

    SKIPPED = "skipped"  # pattern
    SWITCHED_OFF = "switched off"  # option
    DISABLED = "disabled"  # name of the pass
    TOO_FEW_ELEMENTS = "too few elements"  # elements, min_numel
    EMPTY = "empty"
    SIZE_FROM_DATA = "size from data"
    SIZE_NOT_IN_BACKWARD = "size not in backward"
    NO_FULL_BLOCK = "no full block"  # elements
    RECOMPUTED = "recomputed"
    RENAMED = "renamed"
    EXACT_BY_OPTION = "exact by option"  # option
    DTYPE = "dtype"  # dtype
    DATA = "data"
    INTEGER = "integer"
    DECIDES = "decides"
    STATISTIC = "statistic"
    WEIGHT = "weight"
    ROTATED = "rotated"
    NO_REPRESENTATION = "no representation"
    PRODUCT = "product"
    LOSS = "loss"
    PERHAPS_LOSS = "perhaps loss"
    ERROR_TOO_LARGE = "error too large"  # bits, relative_error, max_relative_error
    NOT_CODABLE = "not codable"  # problem, in the words of the codebooks' own error
    NOT_EVALUABLE = "not evaluable"  # problem, in the words of what was raised
    UNKNOWN_INPUT = "unknown input"  # node
    NOT_SAVED = "not saved"
    NEEDED = "needed"
    RETURNED = "returned"
    CODE_NOT_SMALLER = "code not smaller"
    GRAPHS_NOT_SMALLER = "graphs not smaller"
    FAULT = "fault"  # fault, as Python prints it


@dataclass(frozen=True)
class Reason:
    """Why something is left exact.

    Attributes:
        cause: The kind of reason.
        details: Names and values of what goes with it, see :class:`Cause`.
    """

    cause: Cause
    details: tuple[tuple[str, Detail], ...] = ()

    @classmethod
    def of(cls, cause: Cause, **details: Detail) -> Reason:
        """A reason with its details."""
        return cls(cause, tuple(details.items()))
