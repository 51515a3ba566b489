"""Derivatives in pieces, as others have them: one level for each interval of x, by the order of the intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fewbit_fx.codebooks.activations import ACTIVATIONS, derivative_of

Array = npt.NDArray[np.float64]
_REACH, _POINTS = 100.0, 4001
_DENSE = 12.0  # beyond it the derivatives of all activations here have settled


@dataclass(frozen=True)
class Piecewise:
    """A function that is constant on intervals.

    Attributes:
        borders: Between the intervals, shape (k - 1,).
        levels: On each, shape (k,).
    """

    borders: tuple[float, ...]
    levels: tuple[float, ...]

    def __call__(self, x: Array) -> Array:
        return np.asarray(self.levels)[np.searchsorted(self.borders, x)]


RELU_SUMS: Mapping[str, Piecewise] = {
    "gelu": Piecewise(
        (-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
        (0.0, -0.04922261145617846, 1.0487405950855513, 1.0),
    ),
    "silu": Piecewise(
        (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
        (0.0, -0.04060357190528599, 1.040321856624382, 1.0),
    ),
}
"""ReGELU2 and ReSiLU2: derivatives of sums of three ReLUs, two bits, as arXiv 2406.16282 publishes them."""


def paper_levels(function: str, bits: int) -> Piecewise:
    """The paper's: the least squared error of f' with uniform weight on [-100, 100] of all that is constant on 2^bits
    intervals, by dynamic programming over a grid (Novikov et al., ICML 2023, section 3).

    Args:
        function: Name of an activation, such as ``gelu``.
        bits: Of a code.
    """
    inner = np.linspace(-_DENSE, _DENSE, _POINTS)
    x = np.concatenate([[-_REACH], inner, [_REACH]])
    weights = np.gradient(x)
    values = derivative_of(ACTIVATIONS[function])(x)
    starts = _best_starts(values, weights, 2**bits)
    pieces = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(x)], strict=True)]
    levels = tuple(float(np.average(values[piece], weights=weights[piece])) for piece in pieces)
    return Piecewise(tuple(float(x[a - 1] + x[a]) / 2 for a in starts[1:]), levels)


def _best_starts(values: Array, weights: Array, pieces: int) -> list[int]:
    """Where each piece begins, so that the weighted variances within pieces add up to the least."""
    mass, first, second = (np.concatenate([[0.0], np.cumsum(weights * values**p)]) for p in (0, 1, 2))
    n = len(values)
    best, choices = np.full(n + 1, np.inf), []
    best[0] = 0.0
    for _ in range(pieces):
        after, chosen = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
        for end in range(1, n + 1):
            inside = second[end] - second[:end] - (first[end] - first[:end]) ** 2 / (mass[end] - mass[:end])
            total = best[:end] + np.maximum(inside, 0.0)
            chosen[end] = int(np.argmin(total))
            after[end] = total[chosen[end]]
        best = after
        choices.append(chosen)
    starts, end = [], n
    for chosen in reversed(choices):
        end = int(chosen[end])
        starts.append(end)
    return starts[::-1]
