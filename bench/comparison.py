"""Values of several backends as cells of a table, each beside what it is compared with: the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.command import MiB, milliseconds
from bench.timing import Timing

NOTHING = "-"
CAPTION = "±: half the distance of the quartiles"


def mebibytes(count: float) -> str:
    """Such as ``1.5 MiB``."""
    return f"{count / MiB:.1f} MiB"


def changes(values: Sequence[float | None], show: Callable[[float], str]) -> list[str]:
    """Each value, those behind the first with the share by which they differ from it; a dash where one is missing."""
    return _cells(values, show, lambda ratio: f"{ratio - 1:+.2%}")


def ratios(values: Sequence[float | None], show: Callable[[float], str]) -> list[str]:
    """The same with the ratio to the first."""
    return _cells(values, show, lambda ratio: f"x {ratio:.2f}")


def times(timings: Sequence[Timing]) -> list[str]:
    """Medians, those behind the first with the ratio that was taken round by round."""
    first, *others = timings
    return [milliseconds(first), *(f"{milliseconds(timing)} (x {timing.ratio:.3f})" for timing in others)]


def _cells(values: Sequence[float | None], show: Callable[[float], str], against: Callable[[float], str]) -> list[str]:
    first = values[0]
    compared = [None, *values[1:]]
    return [
        NOTHING if own is None else f"{show(own)} ({against(other / first)})" if other and first else show(own)
        for own, other in zip(values, compared, strict=True)
    ]
