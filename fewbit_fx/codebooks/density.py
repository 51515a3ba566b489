"""Densities of pre-activations: how often each x is met, which is what a codebook's error is weighted by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewbit_fx.codebooks.fitting import Array
from fewbit_fx.torch_private.modes import real_mode

_POINTS = 16_385
_DEVIATIONS = 3.0  # of Typical, from 0 to the end of the interval
_BEYOND = 0.015  # weight of Typical beyond the interval
_BEYOND_TO = 10.0  # times the interval's end
_BEYOND_POINTS = 512
_AT_LIMITS = 0.02  # weight of Typical where f' has its limits
_TAIL = 6.0  # of Normal, from the mean to the end of the interval


@dataclass(frozen=True)
class Extent:
    """The part of the x axis in which a derivative varies.

    Attributes:
        reach: On [-reach, reach] only, but for a small share of its range.
        ends: Far points, at most one on each side, where it has its limit; none on a side where it never settles.
    """

    reach: float
    ends: tuple[float, ...] = ()


@dataclass(frozen=True)
class Uniform:
    """Every x of an interval alike.

    Attributes:
        low, high: The interval; both None (default) for where the function varies, [-r, r].
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"Uniform takes both ends or none; got low={self.low!r}, high={self.high!r}")
        if self.low is not None and self.high is not None:
            ends = math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high
            if not ends:
                raise ValueError(f"Uniform's ends must be finite and ascend; got low={self.low!r}, high={self.high!r}")

    def points(self, extent: Callable[[], Extent]) -> tuple[Array, Array]:
        """Points x and their weights, both of shape (n,); ``extent()`` has the r of [-r, r]."""
        low, high = (-(r := extent().reach), r) if self.low is None or self.high is None else (self.low, self.high)
        x = np.linspace(low, high, _POINTS)
        return x, np.full(len(x), 1 / len(x))

    def __str__(self) -> str:
        return "uniform where it varies" if self.low is None else f"uniform on [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Normal:
    """Normally distributed x, whatever the function.

    Attributes:
        mean: The mean of x.
        std: Standard deviation of x, above 0.

    Examples:
        >>> import fewbit_fx
        >>> narrow, wide = (fewbit_fx.density.Normal(0, std) for std in (0.01, 2))
        >>> [round(level, 2) for level in fewbit_fx.codebook("gelu", 1, narrow).levels]
        [0.49, 0.51]
        >>> [round(level, 2) for level in fewbit_fx.codebook("gelu", 1, wide).levels]
        [0.02, 0.98]
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"Normal takes a finite mean and a std above 0; got {self.mean!r} and {self.std!r}")

    def points(self, extent: Callable[[], Extent]) -> tuple[Array, Array]:
        """Points x and their weights, both of shape (n,)."""
        z = np.linspace(-_TAIL, _TAIL, _POINTS)
        return self.mean + self.std * z, _bell(z)

    def __str__(self) -> str:
        return f"normal, mean {self.mean:g}, std {self.std:g}"


@dataclass(frozen=True)
class Typical:
    """What the backend and the drop-in modules assume of pre-activations they have not seen.

    Normal around 0, with three standard deviations to the end of the interval where the function
    varies, on a uniform floor of one tenth for the tails. A few per cent lie beyond the interval, and
    where the derivative has its limits: saturated units must not keep a gradient that more bits do not
    remove.
    """

    def points(self, extent: Callable[[], Extent]) -> tuple[Array, Array]:
        """Points x and their weights, both of shape (n,)."""
        found = extent()
        z = np.linspace(-1.0, 1.0, _POINTS)
        x, weights = [found.reach * z], [0.9 * _bell(_DEVIATIONS * z) + 0.1 / len(z)]
        for end in found.ends:
            farthest = max(found.reach, min(_BEYOND_TO * found.reach, abs(end)))
            beyond = math.copysign(1.0, end) * np.geomspace(found.reach, farthest, _BEYOND_POINTS)
            x += [beyond, np.array([end])]
            weights += [np.full(_BEYOND_POINTS, _BEYOND / 2 / _BEYOND_POINTS), np.array([_AT_LIMITS / 2])]
        together = np.concatenate(weights)
        return np.concatenate(x), together / together.sum()

    def __str__(self) -> str:
        return "typical (normal on a uniform floor where it varies, and a few per cent beyond)"


@dataclass(frozen=True, eq=False)
class Observed:
    """Pre-activations as they were observed.

    Attributes:
        x: Any floating point tensor of finite values, not empty; each value weighs the same.
    """

    x: Tensor

    def __post_init__(self) -> None:
        if not (self.x.is_floating_point() and self.x.numel() and bool(torch.isfinite(self.x).all())):
            raise ValueError(
                f"Observed takes a floating point tensor of finite values, not empty; "
                f"got shape {tuple(self.x.shape)}, {self.x.dtype}"
            )

    def points(self, extent: Callable[[], Extent]) -> tuple[Array, Array]:
        """Points x and their weights, both of shape (n,)."""
        with real_mode():
            x = self.x.detach().double().flatten().cpu().numpy()
        return x, np.full(len(x), 1 / len(x))

    def __str__(self) -> str:
        return f"{self.x.numel():,} observed values"


Density = Uniform | Normal | Typical | Observed

_FORMS = "uniform, uniform:LOW,HIGH, normal:MEAN,STD, typical, or a .npy or .pt file of pre-activations"


def parse_density(text: str) -> Density:
    """A density from its text form.

    Args:
        text: ``uniform``, ``uniform:LOW,HIGH``, ``normal``, ``normal:MEAN,STD``, ``typical``, or the
            path of a .npy or .pt file that holds pre-activations.

    Raises:
        ValueError: Another text, numbers that are not allowed, or a file that holds something else.
    """
    kind, _, rest = text.partition(":")
    kinds: dict[str, tuple[type[Uniform | Normal | Typical], tuple[int, ...]]] = {
        "uniform": (Uniform, (0, 2)),
        "normal": (Normal, (0, 2)),
        "typical": (Typical, (0,)),
    }
    if kind in kinds:
        made, counts = kinds[kind]
        try:
            numbers = [float(n) for n in rest.split(",")] if rest else []
        except ValueError:
            numbers = [0.0]  # a count that none takes
        if len(numbers) in counts:
            return made(*numbers)
    elif text.endswith((".npy", ".pt")) and Path(text).is_file():
        return Observed(_load_tensor(text))
    raise ValueError(f"density is {text!r}; allowed is {_FORMS}")


def _load_tensor(path: str) -> Tensor:
    try:
        loaded = np.load(path) if path.endswith(".npy") else torch.load(path, weights_only=True)
    except Exception as fault:  # whatever the two raise for a file of another kind
        raise ValueError(f"density file {path!r} is not what np.save or torch.save make of a tensor") from fault
    numbers = isinstance(loaded, Tensor) or (isinstance(loaded, np.ndarray) and loaded.dtype.kind in "fiub")
    if not numbers:
        raise ValueError(f"density file {path!r} holds a {type(loaded).__name__}; allowed is one tensor of numbers")
    return torch.as_tensor(loaded)


def _bell(z: Array) -> Array:
    bell = np.exp(-0.5 * z**2)
    return np.asarray(bell / bell.sum(), dtype=np.float64)
