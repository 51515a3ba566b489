"""Points ever nearer to where a function bends most: what lies between the points of a grid.

A grid meets a pole by luck only. Near a weak one, such as that of log|x - a|, its values are no larger than
elsewhere, but they bend there, and each closer look shows larger ones.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fewbit_fx.codebooks.fitting import Array

_STRETCHES = 16  # of the grid, each looked at by itself: what bends in one does not hide the others
_PER_STRETCH = 4  # cells, by height and by bend
_POINTS = 40  # in each cell and round; even, so that a pole in the middle is straddled
_ROUNDS = 9
_FINEST = 1e-12  # width of the last cells, relative above 1: nearer, what is seen is rounding


def values_near_poles(function: Callable[[Array], Array], x: Array, values: Array) -> Array:
    """Values of ``function`` on the grid and near where it may grow, shape (m,); NaN where it has none.

    Args:
        function: Elementwise function of a float64 array.
        x: A grid, ascending, shape (n,), n at least 3.
        values: Those of the function there, shape (n,), finite.
    """
    middle = _suspects(values)
    low, high = x[middle - 1], x[middle + 1]
    seen = [values]
    for _ in range(_ROUNDS):
        points = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, _POINTS)
        found = function(points.ravel()).reshape(points.shape)
        seen.append(found.ravel())
        at = _bend(found).argmax(1)[:, None]
        low, high = (np.take_along_axis(points, at + step, 1)[:, 0] for step in (0, 2))
        wide = high - low > _FINEST * np.maximum(1.0, np.abs(low))
        low, high = low[wide], high[wide]
        if not len(low):
            break
    return np.concatenate(seen)


def _bend(values: Array) -> Array:
    """The second difference at the inner points; infinite next to what is not finite."""
    with np.errstate(all="ignore"):
        bend = np.abs(np.diff(values, 2))
    return np.where(np.isnan(bend), np.inf, bend)


def _suspects(values: Array) -> npt.NDArray[np.int64]:
    """Indices of inner points where the function is farthest out or bends most, a few in each stretch of the grid."""
    height = np.abs(values - np.median(values))[1:-1]
    return np.union1d(_peaks(height), _peaks(_bend(values))) + 1


def _peaks(score: Array) -> npt.NDArray[np.int64]:
    """Where a score is largest among the points of its stretch, and no less than at its neighbours."""
    padded = np.pad(score, 1)
    peak = np.where((score >= padded[:-2]) & (score >= padded[2:]), score, 0.0)
    width = -(-len(score) // _STRETCHES)
    stretches = np.pad(peak, (0, width * _STRETCHES - len(score))).reshape(_STRETCHES, width)
    most = np.argsort(stretches, 1)[:, -_PER_STRETCH:] + width * np.arange(_STRETCHES)[:, None]
    inside = most[most < len(score)]
    return np.asarray(inside[peak[inside] > 0], dtype=np.int64)
