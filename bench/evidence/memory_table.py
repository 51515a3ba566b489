"""The tables of memory and time: each method on each model, and for each model the best of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from bench.comparison import mebibytes
from bench.evidence.frontier import NOISE, Point, frontier, points
from bench.evidence.methods import METHODS, REFERENCE
from bench.evidence.models import sizes_of
from bench.result_file import File, markdown, measured_with

SMALL_ERROR = 0.02
"""Of the first gradient: about what the rounding of bfloat16 changes it by."""
SLOWER = 0.05
"""By what a step may take longer without being called slower."""


def lines(files: Sequence[File]) -> Iterator[str]:
    """A row for each model, a column for each method that most models have been measured with."""
    found = points(files)
    methods = _usual(found)
    yield from markdown(["bytes held, time, error", *methods], *_grid(found, methods))
    yield f"\n<sub>{_CAPTION} {_sizes(files)}. {measured_with(files)}.</sub>"


def all_lines(files: Sequence[File]) -> Iterator[str]:
    """A row for each method, a column for each model that has been measured with more than the usual ones."""
    found = points(files)
    usual = _usual(found)
    thorough = {model: each for model, each in found.items() if len(each) > len(usual)}
    methods = _measured(thorough)
    columns = [["bytes held, time, error", *methods], *_grid(thorough, methods)]
    head, *body = map(list, zip(*columns, strict=True))
    yield from markdown(head, *body)
    yield "\n<sub>Measured as above.</sub>"


def _measured(found: Mapping[str, Sequence[Point]]) -> list[str]:
    """The methods that a model has been measured with, in order."""
    names = {point.method for each in found.values() for point in each}
    return [name for name in METHODS if name in names]


def _usual(found: Mapping[str, Sequence[Point]]) -> list[str]:
    """Those that more than half of the models have been measured with."""
    counts = Counter(point.method for each in found.values() for point in each)
    return [name for name in METHODS if 2 * counts[name] > len(found)]


def _grid(found: Mapping[str, Sequence[Point]], methods: Sequence[str]) -> Iterator[list[str]]:
    """For each model its name, and a cell for each method."""
    for model, each in found.items():
        by_method, best = {point.method: point for point in each}, frontier(each)
        of_methods = (by_method.get(name) for name in methods)
        yield [model, *(_cell(point, point not in best) if point else "" for point in of_methods)]


_CAPTION = (
    "Bytes that the allocator holds from forward to backward, against torch.compile's default; time of a forward and a "
    "backward over that of torch.compile's default; in brackets the error of the first gradient by codes alone. "
    f"*Slanted*: beaten, as another method has fewer bytes at no more time (within {100 * NOISE:.0f} %) and error."
)


def _sizes(files: Sequence[File]) -> str:
    return f"{files[0].data['settings']['dtype']}, {sizes_of(f.data['settings']['scale'] for f in files)}"


def _cell(point: Point, is_beaten: bool = False) -> str:
    if point.method == REFERENCE:
        return mebibytes(point.held_bytes)
    error = f" ({_percent(point.error)})" if point.error else ""
    text = f"{100 * (point.held - 1):+.0f} %, x {point.time:.2f}{error}"
    return f"*{text}*" if is_beaten else text


def _percent(error: float) -> str:
    return f"{100 * error:.1f} %" if math.isfinite(error) else "not finite"


def best_lines(files: Sequence[File]) -> Iterator[str]:
    """A row for each model: the fewest bytes under each of several conditions, whoever has them."""
    found = points(files)
    conditions = {
        "exact, no slower": lambda p: p.error == 0 and p.time <= 1 + SLOWER,
        f"error below {100 * SMALL_ERROR:.0f} %, no slower": lambda p: p.error < SMALL_ERROR and p.time <= 1 + SLOWER,
        "no slower": lambda p: p.time <= 1 + SLOWER,
        "exact": lambda p: p.error == 0,
        "at any time and error": lambda p: True,
    }
    body = (
        [model, *(_winner([p for p in each if math.isfinite(p.error) and holds(p)]) for holds in conditions.values())]
        for model, each in found.items()
    )
    yield from markdown(["fewest bytes held", *conditions], *body)
    yield f"\n<sub>No slower: at most {100 * SLOWER:.0f} % above torch.compile's default. Measured as above.</sub>"


def _winner(allowed: Sequence[Point]) -> str:
    if not allowed:
        return "none"
    best = min(allowed, key=lambda point: point.held)
    return f"{best.method}: {_cell(best)}"


def verdict(files: Sequence[File]) -> Iterator[str]:
    """A line for each model: which of fewbit's methods are beaten, and by what."""
    for model, each in points(files).items():
        others = [point for point in each if not point.is_ours]
        beaten = {ours.method: [other.method for other in others if other.beats(ours)] for ours in each if ours.is_ours}
        told = [f"`{ours}` by {', '.join(f'`{name}`' for name in names)}" for ours, names in beaten.items() if names]
        yield f"- {model}: {'; '.join(told) or 'none'}."
