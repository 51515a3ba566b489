"""What a trainer's logger is told of fewbit, and when."""

from __future__ import annotations

from collections.abc import Callable

from fewbit_fx.dynamo.verifier import Verification
from fewbit_fx.reporting.report import Report


class Numbers:
    """Numbers to log: those of the report once they are known or other than before, and each error once.

    Args:
        report: Gives the report.
    """

    def __init__(self, report: Callable[[], Report]) -> None:
        self._report = report
        self._bytes: dict[str, float] = {}
        self._errors: dict[str, float] = {}

    def found(self, found: Verification) -> None:
        """An error to log next time."""
        self._errors = gradient_error(found)

    def take(self) -> dict[str, float]:
        """What is new since the last time; empty if nothing is."""
        now = saved_bytes(self._report())
        new = {**(now if now != self._bytes else {}), **self._errors}
        self._bytes, self._errors = now, {}
        return new


def saved_bytes(report: Report) -> dict[str, float]:
    """Bytes saved for the backward, by the names they are logged under; empty before a graph has been compiled."""
    if not report.graphs:
        return {}
    return {
        "fewbit/saved_bytes": report.fewbit_bytes,
        "fewbit/saved_bytes_inductor": report.plain_bytes,
        "fewbit/saving": report.saving,
    }


def gradient_error(found: Verification) -> dict[str, float]:
    """The error of the whole gradient, of itself and, where that is known, of the noise between batches."""
    error = {"fewbit/gradient_error": found.relative_error}
    return error if found.share_of_noise is None else {**error, "fewbit/gradient_error_of_noise": found.share_of_noise}
