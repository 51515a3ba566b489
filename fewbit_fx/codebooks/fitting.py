"""Codebooks: the few levels that stand for a derivative, optimal for its values.

A codebook of b bits holds at most 2^b levels; a value is coded by its nearest level. The levels
minimise the weighted squared error over a sample of values, which is one-dimensional k-means, and
in one dimension dynamic programming finds the global optimum (Novikov et al., arXiv 2202.00441,
section 4, fit intervals of x in the same way; fitting the *values* of the derivative lets several
intervals share a level, and is never worse).
"""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_BITS_BELOW = 23  # of a float32's 24: so that the sum of two levels, and their difference from it, are exact
_NEARLY = 1e-5  # by so much of itself the squared error may rise for levels that mirror themselves


@dataclass(frozen=True)
class Codebook:
    """Levels in ascending order, and how well they stand for the sample they were fitted to.

    Attributes:
        levels: At most 2^bits of them, ascending.
        relative_error: Root mean square of (nearest level - f'(x)) over that of f'(x), a ratio, both means
            weighted by the density of x that the codebook was fitted for. With the typical density x
            reaches beyond where f' varies, to its limits. It predicts the relative error of a gradient that
            is multiplied by f'(x), for x of that density.
        mean_squared_error: Mean of (nearest level - f'(x))^2, weighted alike.

    Raises:
        ArithmeticError: A number that is not finite. No input may lead here: it is a fault of the fit.
    """

    levels: tuple[float, ...]
    relative_error: float
    mean_squared_error: float

    def __post_init__(self) -> None:
        numbers = (*self.levels, *self.boundaries, self.relative_error, self.mean_squared_error)
        if not all(map(math.isfinite, numbers)):
            raise ArithmeticError(f"a codebook's numbers must be finite; got {self}")

    @property
    def bits(self) -> int:
        """Bits needed to name a level; at least 1."""
        return bits_for(self.levels)

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Values at which the nearest level changes: midpoints of neighbouring levels."""
        return boundaries_between(self.levels)

    def ranks(self, values: Array) -> npt.NDArray[np.int64]:
        """The index of the level nearest to each value."""
        return np.searchsorted(self.boundaries, values, side="right").astype(np.int64)

    def nearest(self, values: Array) -> Array:
        """The level nearest to each value."""
        return np.asarray(self.levels)[self.ranks(values)]


def bits_for(levels: Sized) -> int:
    """Bits needed to name one of the levels; at least 1."""
    return max(1, (len(levels) - 1).bit_length())


def gray_code(rank: int) -> int:
    """The code of the level of this rank: neighbours differ in one bit."""
    return rank ^ (rank >> 1)


def boundaries_between(levels: tuple[float, ...]) -> tuple[float, ...]:
    """Midpoints of neighbouring levels, which ascend."""
    return tuple((a + b) / 2 for a, b in zip(levels[:-1], levels[1:], strict=True))  # noqa: RUF007  (Dynamo traces it)


def fit_codebook(values: Array, weights: Array, bits: int, max_points: int = 2048) -> Codebook:
    """The codebook of ``2**bits`` levels with the least weighted squared error.

    Args:
        values: Sample of the derivative, shape (n,).
        weights: Weight of each value, shape (n,), not negative, not all zero.
        bits: Bits per code.
        max_points: Samples with more distinct values are first merged into this many bins of
            neighbouring values (each stands at its weighted mean).

    Raises:
        ValueError: Empty or unequal arrays, or weights that sum to zero.
    """
    if values.ndim != 1 or values.shape != weights.shape or not weights.sum() > 0:
        raise ValueError(
            f"values and weights must be equally long, with a positive sum of weights; "
            f"got shapes {values.shape} and {weights.shape}"
        )
    points, mass = _merge(values, weights, max_points)
    levels = _mirrored(optimal_levels(points, mass, 2**bits), values, weights)
    squared_error = _squared_error(levels, values, weights)
    power = float(np.average(values**2, weights=weights))
    relative = math.sqrt(squared_error / power) if power > 0 else 0.0
    return Codebook(tuple(levels.tolist()), relative, squared_error)


def _mirrored(levels: Array, values: Array, weights: Array) -> Array:
    """Levels that mirror themselves, where the best ones do but for the sample's bins: see :func:`is_mirrored`.

    Those of GELU, SiLU and softplus do, since f'(-x) = 1 - f'(x). Then half of the code follows from |x|, and half of
    the levels from the others.
    """
    grid = 2.0 ** (math.frexp(float(np.abs(values).max()))[1] - _BITS_BELOW)
    centre = grid * np.round((values.min() + values.max()) / grid)
    low = grid * np.round((levels + centre - levels[::-1])[: (len(levels) + 1) // 2] / 2 / grid)
    other = np.concatenate([low, centre - low[: len(levels) // 2][::-1]])
    best = _squared_error(levels, values, weights)
    return other if _squared_error(other, values, weights) <= (1 + _NEARLY) * best else levels


def is_mirrored(levels: tuple[float, ...]) -> bool:
    """Whether levels come in pairs of one sum, in float32 without rounding, and every code of 3 bits or more is one.

    The Gray code of a level differs from its pair's in the first bit alone.
    """
    centre = levels[0] + levels[-1]
    exact = all(float(np.float32(number)) == number for number in (centre, *levels))
    pairs = all(low + high == centre for low, high in zip(levels, reversed(levels), strict=True))
    return len(levels) == 2 ** bits_for(levels) >= 8 and exact and pairs


def _squared_error(levels: Array, values: Array, weights: Array) -> float:
    """Weighted mean of the squared distance to the nearest level."""
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, values, side="right")]
    return float(np.average((values - nearest) ** 2, weights=weights))


def optimal_levels(points: Array, mass: Array, k: int) -> Array:
    """The at most ``k`` levels that minimise ``sum(mass * (points - nearest level)**2)``.

    ``points`` must ascend strictly. Layer j of the dynamic program holds the least cost of the
    first i points with j levels; its argument of the minimum never decreases with i, so each layer
    is found by divide and conquer in O(n log n).
    """
    n = len(points)
    if k >= n:
        return points.copy()
    clusters = _Clusters(points, mass)
    starts = np.zeros((k, n), dtype=np.int64)
    best = clusters.cost(np.zeros(n, dtype=np.int64), np.arange(n))
    for layer in range(1, k):
        best, starts[layer] = _next_layer(clusters, best)
    return clusters.means(_starts_of_best(starts, n))


class _Clusters:
    """Cost and mean of runs of neighbouring points, from prefix sums."""

    def __init__(self, points: Array, mass: Array) -> None:
        self._centre = float(np.average(points, weights=mass))  # centred, so that squares do not cancel
        p = points - self._centre
        self._sums = [np.concatenate(([0.0], np.cumsum(mass * p**power))) for power in range(3)]

    def cost(self, first: Any, last: Any) -> Array:
        """Weighted squared error of points first..last (inclusive) around their mean."""
        m0, m1, m2 = (s[last + 1] - s[first] for s in self._sums)
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = m2 - m1 * m1 / m0
        return np.where(m0 > 0, np.maximum(spread, 0.0), 0.0)

    def means(self, starts: npt.NDArray[np.int64]) -> Array:
        ends = np.append(starts[1:], len(self._sums[0]) - 1)
        m0, m1 = (s[ends] - s[starts] for s in self._sums[:2])
        kept = m0 > 0
        return np.unique(m1[kept] / m0[kept] + self._centre)


def _next_layer(clusters: _Clusters, best: Array) -> tuple[Array, npt.NDArray[np.int64]]:
    """One more level: for each i the least of best[s - 1] + cost(s, i) over s, and that s.

    All midpoints of one depth of the recursion are evaluated in one vectorised sweep.
    """
    n = len(best)
    before = np.concatenate(([0.0], best[:-1]))  # cost of the points before s
    result, argmin = best.copy(), np.zeros(n, dtype=np.int64)
    todo = [(0, n - 1, 0, n - 1)]  # first i, last i, least s, greatest s
    while todo:
        blocks = np.array(todo, dtype=np.int64)
        mid = (blocks[:, 0] + blocks[:, 1]) // 2
        low, high = blocks[:, 2], np.minimum(blocks[:, 3], mid)
        width = high - low + 1
        offset = np.concatenate(([0], np.cumsum(width)[:-1]))
        start = np.arange(width.sum()) - np.repeat(offset - low, width)
        total = before[start] + clusters.cost(start, np.repeat(mid, width))
        least = np.minimum.reduceat(total, offset)
        first_hit = np.flatnonzero(total == np.repeat(least, width))
        owner = np.repeat(np.arange(len(mid)), width)[first_hit]
        argmin[mid[owner[::-1]]] = start[first_hit[::-1]]  # the first hit is written last
        result[mid] = least
        at = argmin[mid]
        left = np.stack((blocks[:, 0], mid - 1, blocks[:, 2], at), axis=1)
        right = np.stack((mid + 1, blocks[:, 1], at, blocks[:, 3]), axis=1)
        both = np.concatenate((left, right))
        todo = both[both[:, 0] <= both[:, 1]].tolist()
    return result, argmin


def _starts_of_best(starts: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    """Walk back from the last point: the first point of each cluster, ascending."""
    found = []
    end = n - 1
    for layer in range(len(starts) - 1, -1, -1):
        start = int(starts[layer, end])
        found.append(start)
        if start == 0:
            break
        end = start - 1
    return np.array(found[::-1], dtype=np.int64)


def _merge(values: Array, weights: Array, max_points: int) -> tuple[Array, Array]:
    """Distinct values in ascending order with their summed weights, at most about ``max_points``."""
    kept = weights > 0
    values, weights = values[kept], weights[kept]
    distinct, index = np.unique(values, return_inverse=True)
    if len(distinct) <= max_points:
        return distinct, np.bincount(index, weights=weights).astype(np.float64)
    span = distinct[-1] - distinct[0]
    bins = np.minimum(((values - distinct[0]) / span * max_points).astype(np.int64), max_points - 1)
    _, index = np.unique(bins, return_inverse=True)
    mass = np.bincount(index, weights=weights).astype(np.float64)
    return np.bincount(index, weights=weights * values) / mass, mass
