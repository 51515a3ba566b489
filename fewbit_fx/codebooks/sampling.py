"""Find the interval in which a derivative varies, and sample its values there.

A codebook must fit the function, not a fixed window: the window is found from the function itself,
so that ``c * tanh(x / c)`` is sampled on an interval that grows with c.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fewbit_fx.codebooks.density import Density, Extent
from fewbit_fx.codebooks.fitting import Array
from fewbit_fx.codebooks.near_poles import values_near_poles

Function = Callable[[Array], Array]

_LINE = 1e6  # the real line, for practical purposes
_COARSE_POINTS = 20_001
_FAR = 1e30  # where even |x|^0.001 has left the range that it has on the line; its cube is finite in float64
_FAR_POINTS = 257
_SETTLED = 1e-2  # share of the derivative's range within which it counts as having reached its limit
_SETTLES_WITHIN = 1e4  # beyond, as where f' decays like 1/sqrt(x), a window stands for x better
_WINDOWS = (1e2, 1e3, 1e4, 1e5)  # for derivatives that never settle: the first that shows nearly all their values
_TAIL_TOLERANCE = 2 * _SETTLED  # share of the sampled range by which values elsewhere may leave it
_NEAR_TOLERANCE = 0.3  # the same of values between the points of the grid
_LEAST, _MOST = (float(n) for n in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
_GROWS = "its derivative grows without bound"
_GROWS_NEAR = "its derivative grows without bound near a point"


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
        density: The density of x. Where it covers the interval in which the derivative varies, that interval is
            found, and the derivative must be bounded on the whole line.

    Raises:
        NotCodableError: The derivative is unbounded, undefined on much of the line, constant, or does not show
            its range within any interval that could be sampled.
    """
    x, weights = density.points(lambda: _extent(derivative))
    values = _evaluate(derivative, x)
    defined = np.isfinite(values)
    if weights[defined].sum() < 0.99 * weights.sum():
        raise NotCodableError("its derivative is not defined on much of the interval where it varies")
    x, values, weights = x[defined], values[defined], weights[defined]
    largest = float(np.abs(values).max())
    if not (largest == 0 or _LEAST <= largest <= _MOST):
        raise NotCodableError(f"its derivative is of size {largest:.0e}, which float32 cannot hold")
    return Sample(x, values, weights / weights.sum())


def _extent(derivative: Function) -> Extent:
    """Find where a derivative varies that is bounded on the whole line."""
    x = _whole_line()
    values = _evaluate(derivative, x)
    defined = _is_defined(values)
    if defined[np.abs(x) < 10].mean() < 0.99:
        raise NotCodableError("its derivative is not defined on much of the real line")
    x, values = x[defined], values[defined]
    _require_held(values)
    span = float(values.max() - values.min())
    if span <= 1e-9 * float(np.abs(values).max()):
        raise NotCodableError("its derivative is constant")
    extent = _where_it_varies(x, values)
    near = values_near_poles(lambda x: _evaluate(derivative, x), x, values)
    near = near[~np.isnan(near)]
    # By each half of the grid: a point that happens to lie on a pole counts in one of them only.
    if any(_outside(near, half) > _NEAR_TOLERANCE for half in (values[::2], values[1::2])):
        raise NotCodableError(_GROWS_NEAR)
    return extent


def _whole_line() -> Array:
    """Points ever denser towards 0, and a few far beyond what any data hold, where slow growth shows."""
    far = np.geomspace(_LINE, _FAR, _FAR_POINTS)[1:]
    return np.concatenate((-far[::-1], symmetric_grid(_LINE, _COARSE_POINTS), far))


def symmetric_grid(reach: float, points: int) -> Array:
    """Points from -reach to reach, ever denser towards 0."""
    scale = 1e-3
    t = np.linspace(-1.0, 1.0, points) * np.arcsinh(reach / scale)
    return np.asarray(scale * np.sinh(t), dtype=np.float64)


def _is_defined(values: Array) -> npt.NDArray[np.bool_]:
    """Tell the points at which a derivative is neither NaN nor an overflow on the way to NaN.

    Far out, a function written by hand may be inf / inf, as x * exp(x) / (1 + exp(x)) is; a little nearer, only
    its numerator has overflowed. A derivative that really grows is infinite to the end.
    """
    defined = ~np.isnan(values)
    if defined.any():
        for outwards in (slice(None), slice(None, None, -1)):
            finite_from = int(np.isfinite(values[outwards]).argmax())
            if not defined[outwards][0]:
                defined[outwards][:finite_from] = False
    return defined


def _require_held(values: Array) -> None:
    """No value may be infinite, or too large for float32."""
    lost = np.abs(values) > _MOST
    if lost[0] or lost[-1]:
        raise NotCodableError(_GROWS)
    if lost.any():
        raise NotCodableError(_GROWS_NEAR)


def _where_it_varies(x: Array, values: Array) -> Extent:
    """The extent; beyond its reach, no value may leave the range of those within."""
    settled = {-1: _settling_point(-x[::-1], values[::-1]), 1: _settling_point(x, values)}
    ends = tuple(float(x[0] if side < 0 else x[-1]) for side, point in settled.items() if point <= _LINE)
    farthest = max(settled.values())
    for reach in (farthest,) if farthest <= _SETTLES_WITHIN else _WINDOWS:
        within = values[np.abs(x) <= reach]
        if _outside(values, within) <= _TAIL_TOLERANCE:
            return Extent(reach, ends)
    if np.abs(values).max() > (1 + _TAIL_TOLERANCE) * np.abs(within).max():
        raise NotCodableError(_GROWS)
    raise NotCodableError("its derivative changes beyond any interval that could be sampled")


def _outside(values: Array, within: Array) -> float:
    """How far values leave the range of others, as a share of that range."""
    low, high = float(within.min()), float(within.max())
    excess = max(float(values.max()) - high, low - float(values.min()))
    return excess / (high - low) if high > low else math.inf * excess if excess else 0.0


def _settling_point(x: Array, values: Array) -> float:
    """Distance from 0 beyond which the derivative stays near its limit at +infinity."""
    unsettled = np.flatnonzero(np.abs(values - values[-1]) > _SETTLED * (values.max() - values.min()))
    return float(abs(x[min(unsettled[-1] + 1, len(x) - 1)])) if len(unsettled) else 0.0


def _evaluate(derivative: Function, x: Array) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(derivative(x), dtype=np.float64)
