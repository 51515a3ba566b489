"""Where a derivative varies, and a weighted sample of its values there.

A codebook must fit the function, not a fixed window: the window is found from the function itself,
so that ``c * tanh(x / c)`` is sampled on an interval that grows with c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fewbit_fx.density import Density
from fewbit_fx.levels import Array

Function = Callable[[Array], Array]

_LINE = 1e6  # the real line, for practical purposes
_COARSE_POINTS = 20_001
_SETTLED = 1e-2  # share of the derivative's range within which it counts as having reached its limit
_PERIODIC_WINDOW = 100.0  # for derivatives that never settle


class NotCodableError(ValueError):
    """A derivative that few levels cannot stand for; the message says why."""


@dataclass(frozen=True)
class Sample:
    """Values of a derivative with the weights of a density of x.

    Attributes:
        x: The sampled points, shape (n,), float64.
        values: The derivative there, shape (n,), float64.
        weights: Density of x there, shape (n,), sum 1.
    """

    x: Array
    values: Array
    weights: Array


def sample_derivative(derivative: Function, density: Density) -> Sample:
    """Sample ``derivative`` by a density of x.

    Args:
        derivative: Elementwise function of a float64 array.
        density: Of x. Where it covers the interval in which the derivative varies, that interval is
            found, and the derivative must be bounded on the whole line.

    Raises:
        NotCodableError: The derivative is unbounded, undefined on much of the line, or constant.
    """
    x, weights = density.points(lambda: _reach(derivative))
    values = _evaluate(derivative, x)
    defined = np.isfinite(values)
    if weights[defined].sum() < 0.99 * weights.sum():
        raise NotCodableError("its derivative is not defined on much of the interval where it varies")
    weights = weights[defined]
    return Sample(x[defined], values[defined], weights / weights.sum())


def _reach(derivative: Function) -> float:
    """The least r such that the derivative varies on [-r, r] only."""
    x = symmetric_grid(_LINE, _COARSE_POINTS)
    values = _evaluate(derivative, x)
    defined = np.isfinite(values)
    if defined[np.abs(x) < 10].mean() < 0.99:
        raise NotCodableError("its derivative is not defined on much of the real line")
    x, values = x[defined], values[defined]
    _require_bounded(derivative, x, values)
    span = float(values.max() - values.min())
    if span <= 1e-9 * max(1.0, float(np.abs(values).max())):
        raise NotCodableError("its derivative is constant")
    return max(_settling_point(x, values, span), _settling_point(-x[::-1], values[::-1], span))


def symmetric_grid(reach: float, points: int) -> Array:
    """Points from -reach to reach, ever denser towards 0."""
    scale = 1e-3
    t = np.linspace(-1.0, 1.0, points) * np.arcsinh(reach / scale)
    return np.asarray(scale * np.sinh(t), dtype=np.float64)


def _require_bounded(derivative: Function, x: Array, values: Array) -> None:
    """Neither the far tails nor a finer look may show a much larger derivative."""
    inner = np.abs(values[np.abs(x) <= 1e-3 * _LINE]).max()
    if np.abs(values).max() > 1.5 * inner + 1e-9:
        raise NotCodableError("its derivative grows without bound")
    fine = _evaluate(derivative, symmetric_grid(_LINE, 8 * _COARSE_POINTS))
    if np.abs(fine[np.isfinite(fine)]).max() > 1.5 * inner + 1e-9:
        raise NotCodableError("its derivative grows without bound near a point")


def _settling_point(x: Array, values: Array, span: float) -> float:
    """Distance from 0 beyond which the derivative stays near its limit at +infinity."""
    unsettled = np.flatnonzero(np.abs(values - values[-1]) > _SETTLED * span)
    last = abs(x[min(unsettled[-1] + 1, len(x) - 1)]) if len(unsettled) else 0.0
    return float(last) if last < 1e-2 * _LINE else _PERIODIC_WINDOW


def _evaluate(derivative: Function, x: Array) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(derivative(x), dtype=np.float64)
