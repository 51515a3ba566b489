"""Derivatives that mirror themselves, f'(-x) = c - f'(x), and codebooks that do so too.

GELU, SiLU and softplus have such a derivative. Their optimal levels mirror themselves but for what the sample's bins
make of it, or come in two mirrored sets, between which rounding decides. With levels that mirror themselves exactly,
half of the code follows from |x|, and encoding is cheaper.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from fewbit_fx.levels import Array, Codebook
from fewbit_fx.sampling import Function, Sample

_NOTHING = 1e-9  # share of the derivative's range that counts as rounding
_COST = 5e-4  # by so much of itself the error may rise


def mirrored(book: Codebook, derivative: Function, sample: Sample) -> Codebook:
    """A codebook as near, whose levels mirror themselves; the same one where the derivative or its best levels do not.

    Args:
        book: Fitted to the sample.
        derivative: Elementwise function of a float64 array.
        sample: Of the derivative, by a density that mirrors itself.
    """
    probe = sample.x[:: max(1, len(sample.x) // 512)]
    with np.errstate(all="ignore"):
        sums = derivative(probe) + derivative(-probe)
    if not np.isfinite(sums).all() or np.ptp(sums) > _NOTHING * np.ptp(sample.values):
        return book
    levels = np.asarray(book.levels)
    return _nearer(book, (levels + (sums.mean() - levels[::-1])) / 2, sample)


def _nearer(book: Codebook, levels: Array, sample: Sample) -> Codebook:
    other = replace(book, levels=tuple(levels.tolist()))
    error = float(np.average((sample.values - other.nearest(sample.values)) ** 2, weights=sample.weights))
    if error > (1 + _COST) ** 2 * book.mean_squared_error:
        return book
    scale = math.sqrt(error / book.mean_squared_error) if book.mean_squared_error else 1.0
    return replace(other, mean_squared_error=error, relative_error=scale * book.relative_error)
