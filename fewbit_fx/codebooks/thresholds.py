"""Find the points of the x axis at which the code of f'(x) changes, so that x is encoded without its derivative.

To compare x with a few constants is cheaper than to compute f'(x), and on a CPU it spares Inductor a
whole tensor in memory: codes computed from f'(x) are 1.4 times slower there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fewbit_fx.codebooks.fitting import Array, Codebook, gray_code
from fewbit_fx.codebooks.sampling import Function, symmetric_grid

Mask = npt.NDArray[np.bool_]

EXACT = 1e-9  # a relative error below this is rounding

_LINE = 1e6  # the real line, for practical purposes
_POINTS = 2**15 + 1
_MOST_FLIPS = 40  # beyond, the comparisons cost more than the derivative
_CLOSE = 1e-10  # relative
_TINY = 1e-30  # what is nearer to 0 counts as 0
_ROUNDS = 8
_MIRRORED = 3e-7  # two roundings to float32, relative
_JUMP = 1e-6  # share of the range of levels
_SMALL_JUMP, _HALVINGS = 1e-3, 160  # from the widest gap that float64 has to none


@dataclass(frozen=True)
class Thresholds:
    """The bits of the code at -infinity, and where each of them flips.

    Attributes:
        start: A bit for each plane, the most significant first.
        flips: For each plane float32 numbers t, ascending: the bit flips where x > t.
        magnitudes: For each plane float32 numbers t, ascending: the bit flips where |x| > t. Each stands for two
            flips, at -t and t.

    Raises:
        ArithmeticError: A threshold that is not finite. No input may lead here: it is a fault of the search.
    """

    start: tuple[bool, ...]
    flips: tuple[tuple[float, ...], ...]
    magnitudes: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if not all(math.isfinite(t) for plane in (*self.flips, *self.magnitudes) for t in plane):
            raise ArithmeticError(f"thresholds must be finite; got {self}")

    def planes(self) -> Iterator[tuple[bool, tuple[float, ...], tuple[float, ...]]]:
        """The bit at -infinity, the flips and the magnitudes of each plane."""
        return zip(self.start, self.flips, self.magnitudes or ((),) * len(self.flips), strict=True)


def find_thresholds(derivative: Function, codebook: Codebook, sampled: Array) -> Thresholds | None:
    """The thresholds of a derivative's code, or None where codes are to be computed from its values.

    That is where they would be too many (periodic derivatives), where the derivative is not finite, where
    the codebook is exact (a boundary off by one float would be an error then), and where the derivative
    jumps at a number that is not a float32.

    Args:
        derivative: Elementwise function of a float64 array.
        codebook: The codebook of the derivative.
        sampled: The x that it was fitted to, among which no change is to be missed.
    """
    if codebook.relative_error < EXACT:
        return None
    changes = _changes(derivative, codebook, np.union1d(symmetric_grid(_LINE, _POINTS), sampled))
    if changes is None:
        return None
    codes, before, after = changes
    first, *later = (gray_code(int(c)) for c in codes)
    flips: list[list[float]] = [[] for _ in range(codebook.bits)]
    code = first
    for new, low, high in zip(later, before, after, strict=True):
        threshold = _threshold(derivative, codebook, low, high)
        if threshold is None:
            return None
        for bit in range(codebook.bits):
            if (code ^ new) >> bit & 1:
                flips[codebook.bits - 1 - bit].append(threshold)
        code = new
    if sum(map(len, flips)) > _MOST_FLIPS:
        return None
    start = tuple(bool(first >> bit & 1) for bit in reversed(range(codebook.bits)))
    return _with_magnitudes(Thresholds(start, tuple(map(tuple, flips))), derivative, codebook)


def _with_magnitudes(thresholds: Thresholds, derivative: Function, codebook: Codebook) -> Thresholds:
    """Replace two comparisons of x by one of |x| wherever flips mirror each other.

    Below -t the two forms differ at the float32 -t itself, so the derivative must not jump there.
    """
    planes = []
    for start, flips, _ in thresholds.planes():
        pairs = [t for t in flips if t > 0 and _mirror_of(t, flips) is not None]
        pairs = [t for t in pairs if not _jumps(derivative, codebook, np.array([-t, t]))]
        alone = tuple(u for u in flips if u not in pairs and u not in [_mirror_of(t, flips) for t in pairs])
        planes.append((start ^ (len(pairs) % 2 == 1), alone, tuple(pairs)))
    return Thresholds(*(tuple(parts) for parts in zip(*planes, strict=True)))


def has_jumps(derivative: Function, x: Array) -> bool:
    """Whether a derivative jumps by more than a thousandth of its range somewhere.

    Args:
        derivative: Elementwise function of a float64 array.
        x: Ascending points, dense enough that rises between neighbours show.
    """
    values = derivative(x)
    least = _SMALL_JUMP * float(np.ptp(values))
    steep = np.flatnonzero(np.abs(np.diff(values)) > least)
    low, high = x[steep], x[steep + 1]
    for _ in range(_HALVINGS):  # towards the steeper half, which in the end is a jump or nothing
        middle = low + (high - low) / 2
        at_low, at_middle, at_high = derivative(low), derivative(middle), derivative(high)
        upper = np.abs(at_high - at_middle) > np.abs(at_middle - at_low)
        low, high = np.where(upper, middle, low), np.where(upper, high, middle)
    return bool((np.abs(derivative(high) - derivative(low)) > least).any())


def _mirror_of(t: float, flips: Collection[float]) -> float | None:
    """The flip at -t, where there is one, but for rounding."""
    return next((u for u in flips if abs(u + t) <= _MIRRORED * t), None)


def _jumps(derivative: Function, codebook: Codebook, x: Array) -> bool:
    """Whether a derivative jumps at one of some float32 numbers."""
    around = np.abs(x) * _MIRRORED
    change = np.abs(derivative(x + around) - derivative(x - around))
    return bool((change > 1e3 * _JUMP * (codebook.levels[-1] - codebook.levels[0])).any())


def _changes(derivative: Function, codebook: Codebook, x: Array) -> tuple[Array, Array, Array] | None:
    """Ranks of the levels from left to right, and close around each change an x before and an x after it.

    None if there are too many or f' is not finite.
    """
    for _ in range(_ROUNDS):  # again where a cell of the grid holds more than one change
        values = derivative(x)
        if not np.isfinite(values).all():
            return None
        ranks = codebook.ranks(values)
        at = np.flatnonzero(np.diff(ranks))
        if len(at) > 4 * _MOST_FLIPS:
            return None
        if _are_close(x[at], x[at + 1]).all():
            return ranks[np.append(at, -1)], x[at], x[at + 1]
        low, high = _bisected(derivative, codebook, x[at], x[at + 1], _are_close)
        x = np.union1d(x, np.concatenate((low, high)))
    return None


def _bisected(
    derivative: Function, codebook: Codebook, low: Array, high: Array, is_enough: Callable[[Array, Array], Mask]
) -> tuple[Array, Array]:
    """Narrower intervals, each from an x with the code of the lower end to one with another code."""
    ranks = codebook.ranks(derivative(low))
    while not (done := is_enough(low, high)).all():
        middle = low + (high - low) / 2
        same = codebook.ranks(derivative(middle)) == ranks
        low, high = np.where(~done & same, middle, low), np.where(~done & ~same, middle, high)
    return low, high


def _are_close(low: Array, high: Array) -> Mask:
    """Nearer than float32 can tell, and wider than the roundings of a continuous f' at its boundaries."""
    return (high - low <= _CLOSE * np.maximum(np.abs(low), np.abs(high))) | _are_about_zero(low, high)


def _are_neighbours(low: Array, high: Array) -> Mask:
    return (np.nextafter(low, np.inf) >= high) | _are_about_zero(low, high)


def _are_about_zero(low: Array, high: Array) -> Mask:
    return np.maximum(np.abs(low), np.abs(high)) < _TINY


def _threshold(derivative: Function, codebook: Codebook, before: float, after: float) -> float | None:
    """The last float32 of a code, from an x before and an x after its end; None if a jump of f' is elsewhere."""
    low, high = np.array([before]), np.array([after])
    jump = np.abs(derivative(high) - derivative(low)).item()
    if jump > _JUMP * (codebook.levels[-1] - codebook.levels[0]):
        low, high = _bisected(derivative, codebook, low, high, _are_neighbours)
    elif not _are_about_zero(low, high).all():
        return float(np.float32(before))
    if _are_about_zero(low, high).all():
        return 0.0 if low.item() == 0 else _float32_before(0.0)
    if np.float32(low) == low:
        return float(low.item())
    return _float32_before(high.item()) if np.float32(high) == high else None


def _float32_before(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(-np.inf)))
