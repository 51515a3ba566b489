"""Which methods are worth a look: those that no other method beats in bytes, time and error at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.evidence.methods import METHODS, REFERENCE
from bench.evidence.models import MODELS
from bench.result_file import File

NOISE = 0.03
"""Of times: ratios that differ by less do not tell methods apart."""


@dataclass(frozen=True)
class Point:
    """One method on one model, against torch.compile's default.

    Attributes:
        model, method: Which.
        held_bytes: Held by the allocator from forward to backward.
        held: The same as a share of the reference's.
        time: Of a step, over the reference's.
        error: Relative error of the first gradient; 0 where a method is exact, infinite where it is not finite.
    """

    model: str
    method: str
    held_bytes: int
    held: float
    time: float
    error: float

    @property
    def is_ours(self) -> bool:
        """Whether it is a method of fewbit."""
        return METHODS[self.method].options is not None

    def beats(self, other: Point) -> bool:
        """Whether it has fewer bytes at no more time and error than another."""
        no_worse = self.time <= other.time * (1 + NOISE) and self.error <= other.error
        return no_worse and self.held < other.held


def points(files: Iterable[File]) -> dict[str, list[Point]]:
    """By model, models and methods in the order of their tables; models without the reference are left out."""
    results = {(f.data["settings"]["model"], f.data["settings"]["method"]): f.data["result"] for f in files}
    return {
        model: [_point(model, name, results) for name in METHODS if (model, name) in results]
        for model in MODELS
        if (model, REFERENCE) in results
    }


def _point(model: str, method: str, results: dict[tuple[str, str], dict]) -> Point:  # type: ignore[type-arg]
    own, plain = results[model, method], results[model, REFERENCE]
    held = own["memory"]["held_bytes"]
    share = held / plain["memory"]["held_bytes"]
    error = own["gradient_error"] or 0.0
    return Point(model, method, held, share, own["timing"]["ratio"], error if math.isfinite(error) else math.inf)


def frontier(of_a_model: Sequence[Point]) -> list[Point]:
    """Those with a gradient that no other beats, fewest bytes last."""
    usable = [point for point in of_a_model if math.isfinite(point.error)]
    unbeaten = [point for point in usable if not any(other.beats(point) for other in usable)]
    return sorted(unbeaten, key=lambda point: -point.held)
