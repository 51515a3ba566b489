"""Levels fitted to the tensor that is coded: in every step anew, to a sample of its elements.

Levels for typical pre-activations fit no narrow tensor: where x is within 0.01 of 0, f' of GELU is within 0.01 of 1/2,
and one constant for all is nearer to it than the levels of a codebook for the whole line. So 480 elements of x, from
all over the tensor, are sorted, and the x axis is divided into intervals, one for each level, that hold equal sums of
``|rise of f'|^(2/3)`` from one of them to the next. Levels are then as dense as has the least squared error,
``(p(x) f''(x)^2)^(1/3)`` (Panter and Dite, 1951; Gray and Neuhoff, 1998, section IV-A). Each level is the mean of f' in
its interval of the sample, where it is no worse than one constant.

Anchors, far points without weight, are sorted in too: of a narrow tensor, what is far from all others, as a dead unit
is, then has a level of its own.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit_fx.codebooks.fitting import gray_code
from fewbit_fx.codec.bitplanes import PlaneLayout
from fewbit_fx.codec.encode_decode import (
    at_least_float32,
    bits_of_rank,
    decode_and_multiply,
    encode,
    flipping,
    takes_signs,
)
from fewbit_fx.codec.nonfinite import Undefined, is_finite
from fewbit_fx.codec.spread import elements_all_over

# Whole numbers and ratios of them: where shapes are dynamic, Dynamo makes inputs of a graph of floats that it reads
# from a module or an object, and those of two drop-ins, which are subgraphs, get in each other's way.
_EXPONENT = 2, 3
_SAMPLE, _ANCHORS = 480, 16  # with anchors on both sides as many as Inductor sorts within a kernel of a GPU
_NEAREST, _PER_OCTAVE = (1, 4), 2  # of anchors, which so reach from 0.25 to 45
_SHARE = 3, 5  # of what the rises of f' within the sample sum to, those beyond it have so much at most
_NO_WEIGHT = 1, 10**6  # an anchor is a level only where it is alone


class Axis(enum.Enum):
    """What is divided into intervals."""

    X = "x"
    MAGNITUDE = "|x|, as f'(-x) = f'(x)"
    SIDES = "|x| and the side of 0, as f'(-x) = c - f'(x)"
    DERIVATIVE = "f'(x), which costs its evaluation, for one that jumps or goes up and down"


@dataclass(frozen=True)
class Fitted:
    """What a tensor is coded with, for each interval, in the order of their Gray codes.

    Attributes:
        lower: Where the interval begins on the axis, shape (intervals,); the first one at -infinity.
        levels: Its level, shape (intervals,). Where sides are told, that for x above 0.
    """

    lower: Tensor
    levels: Tensor


@dataclass(frozen=True)
class SampledScheme:
    """How a derivative is coded with levels from a sample. A code is the Gray code of an interval's rank.

    Attributes:
        code_bits: Bits per code, at most ``config.MOST_BITS_OF_SAMPLED_LEVELS``. The first may be the side of 0.
        axis: What is divided.
        sum_of_sides: f'(-x) + f'(x), where the side is told, as a ratio of whole numbers.
        undefined: Which of NaN and the infinities have a derivative that is not finite; None if none has.
        relative_error: Predicted for typical pre-activations: root mean square of (level - f'(x)) over that of f'(x).
    """

    code_bits: int
    axis: Axis
    sum_of_sides: tuple[int, int]
    undefined: Undefined | None
    relative_error: float

    levels = ()  # none that are known before a tensor is
    seeded = False

    @property
    def table_numel(self) -> int:
        """The number of levels that are saved beside the planes."""
        return self._intervals

    @property
    def mirrored(self) -> bool:
        """Whether half of the levels follow from the others."""
        return self.axis is Axis.SIDES

    @property
    def guarded(self) -> bool:
        """Whether codes tell what is not finite (``codec/nonfinite.py``)."""
        return self.undefined is not None

    def encode(self, x: Tensor, derivative: Callable[[Tensor], Tensor], layout: PlaneLayout) -> list[Tensor]:
        """The planes of the codes of f'(x), and the levels.

        Args:
            x: Tensor of any shape and floating point dtype, not empty.
            derivative: f', elementwise, for tensors of the dtype of x.
            layout: Of the planes.
        """
        fitted = self.fit(x, derivative)
        bits_of = functools.partial(self.bits, derivative=derivative, lower=fitted.lower)
        return [*encode(x, bits_of, layout, self.guarded, self.mirrored), fitted.levels]

    def decode(
        self,
        gradient: Tensor,
        saved: Sequence[Tensor],
        layout: PlaneLayout,
        dtype: torch.dtype,
        product: Callable[[Tensor, Tensor], Tensor] = torch.mul,
    ) -> Tensor:
        """``gradient * level`` by a product, of a dtype; ``saved`` and ``layout`` as for :meth:`encode`."""
        *planes, levels = saved
        table = self.by_code(levels.unbind())
        return decode_and_multiply(gradient, planes, table, layout, dtype, product, self.guarded, self.mirrored)

    def coded(self, x: Tensor, derivative: Callable[[Tensor], Tensor]) -> Tensor:
        """The level of each element, without planes. Arguments are those of :meth:`encode`."""
        fitted = self.fit(x, derivative)
        thresholds = fitted.lower[[gray_code(rank) for rank in range(1, self._intervals)]]
        rank = torch.bucketize(self._along_axis(x, derivative).contiguous(), thresholds)
        code = torch.bitwise_xor(rank, rank >> 1) + (torch.where(x > 0, self._intervals, 0) if self.mirrored else 0)
        return torch.stack(self.by_code(fitted.levels.unbind()))[code]

    def fit(self, x: Tensor, derivative: Callable[[Tensor], Tensor]) -> Fitted:
        """The intervals and levels for a tensor. Arguments are those of :meth:`encode`."""
        return self.fit_to(elements_all_over(x, torch.arange(self.points, device=x.device)), derivative)

    def fit_to(self, drawn: Tensor, derivative: Callable[[Tensor], Tensor]) -> Fitted:
        """The intervals and levels for a tensor of which some elements were drawn.

        Args:
            drawn: Its ``elements_all_over``, shape (points,).
            derivative: As for :meth:`encode`.
        """
        points, weights = self._points(drawn, derivative)

        def slope(points: Tensor) -> Tensor:
            if self.axis is Axis.DERIVATIVE:
                return points
            return finite(at_least_float32(derivative(points.to(drawn.dtype))))

        number = torch.arange(len(points), device=drawn.device)
        following = points[(number + 1).clamp(max=len(points) - 1)]
        values = slope(points)
        rises = weigh_rises((slope(following) - values).abs())
        sums, shape = sums_up_to_each(rises), (self._intervals, len(points))
        # All that follows is of that shape, also where rows are the same: a GPU has one kernel for it then.
        sums = _with_limited_tails(rises.expand(shape), sums.expand(shape), weights == 1)
        rank = _from_gray_code(torch.arange(self._intervals, device=drawn.device)).unsqueeze(-1)
        step, is_first, is_last = sums[:, -1:] / self._intervals, rank == 0, rank == self._intervals - 1
        first = torch.where(is_first, 0, 1 + (sums < rank * step).sum(-1, keepdim=True))
        behind = 1 + (sums < (rank + 1) * step).sum(-1, keepdim=True)
        lower = torch.where(is_first, -float("inf"), _middle_before(first, number, points))
        upper = torch.where(is_last, float("inf"), _middle_before(behind, number, points))
        weight = torch.where((points > lower) & (points <= upper), weights, 0.0)
        total, sum_of_values = weight.sum(-1), (weight * values).sum(-1)
        first_value = torch.where(number == first, values, 0.0).sum(-1)
        return Fitted(lower.squeeze(-1), torch.where(total > 0, sum_of_values / total, first_value))

    @property
    def _intervals(self) -> int:
        return int(2 ** (self.code_bits - 1)) if self.mirrored else int(2**self.code_bits)

    def _along_axis(self, x: Tensor, derivative: Callable[[Tensor], Tensor]) -> Tensor:
        if self.axis is Axis.DERIVATIVE:
            return at_least_float32(derivative(x))
        wide = at_least_float32(x)
        return wide if self.axis is Axis.X else wide.abs()

    @property
    def _one_sided(self) -> bool:
        return self.axis in (Axis.MAGNITUDE, Axis.SIDES)

    @property
    def points(self) -> int:
        """How many points are sorted: the sample, and anchors in place of the last elements that are drawn."""
        return _SAMPLE + (_ANCHORS if self._one_sided else 2 * _ANCHORS)

    def by_code(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The level of each code, of the levels of intervals."""
        return both_sides(levels, self.sum_of_sides) if self.mirrored else list(levels)

    def _points(self, drawn: Tensor, derivative: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The sample and the anchors, ascending along the axis, and their weights."""
        number = torch.arange(self.points, device=drawn.device)
        sample = finite(at_least_float32(drawn))
        distance = (_NEAREST[0] / _NEAREST[1]) * torch.exp2(
            ((number - _SAMPLE) % _ANCHORS).to(sample.dtype) / _PER_OCTAVE
        )
        anchors = torch.where(number < _SAMPLE + _ANCHORS, distance, -distance)
        points = torch.where(number < _SAMPLE, sample.abs() if self._one_sided else sample, anchors)
        if self.axis is Axis.DERIVATIVE:
            points = finite(at_least_float32(derivative(points.to(drawn.dtype))))
        points, order = torch.sort(points)
        return points, torch.where(order < _SAMPLE, torch.ones_like(points), _NO_WEIGHT[0] / _NO_WEIGHT[1])

    def bits(
        self, x: Tensor, derivative: Callable[[Tensor], Tensor], lower: Tensor, compiled: bool = True
    ) -> list[Tensor]:
        """The bits of the codes, the most significant first; where guarded, a last one says what is finite.

        Args:
            x: The tensor to encode, or a part of it.
            derivative: As for :meth:`encode`.
            lower: Where the intervals begin.
            compiled: Whether Inductor compiles these operations.
        """
        signs, compared = takes_signs(x, compiled), self._along_axis(x, derivative)
        bits = []
        if self.mirrored:
            wide = at_least_float32(x)
            bits.append(flipping(x, [(wide, torch.zeros((), dtype=wide.dtype, device=x.device))], signs))
        thresholds = [lower[gray_code(rank)] for rank in range(1, self._intervals)]
        bits += bits_of_rank(x, compared, thresholds, signs)
        if self.undefined is None:
            return bits
        if self.axis is Axis.DERIVATIVE:
            return [*bits, is_finite(compared)]
        return [*bits, self.undefined.spares(at_least_float32(x), signs)]


def both_sides(levels: Sequence[Tensor], sum_of_sides: tuple[int, int]) -> list[Tensor]:
    """The levels for x below 0, and those for x above, which these are."""
    return [*(sum_of_sides[0] / sum_of_sides[1] - level for level in levels), *levels]


def weigh_rises(rises: Tensor) -> Tensor:
    """What each rise of f' weighs, where intervals are to weigh the same.

    Not as a power: for a CPU Inductor keeps what it took an exp for, and a power it computes again for each pair of
    :func:`sums_up_to_each`, which took five times as long as all else.
    """
    return torch.exp(torch.log(rises) * (_EXPONENT[0] / _EXPONENT[1]))


def finite(x: Tensor) -> Tensor:
    """The tensor with zeros in place of what is not finite."""
    return torch.where(x.abs() < float("inf"), x, 0.0)


def sums_up_to_each(values: Tensor) -> Tensor:
    """Cumulative sums of a few numbers, shape (n,).

    As n sums of n numbers: of torch's own there is no deterministic kernel on a GPU, and Inductor does not fuse them on
    a CPU.
    """
    number = torch.arange(len(values), device=values.device)
    return torch.where(number <= number.unsqueeze(-1), values, 0.0).sum(-1)


def _with_limited_tails(rises: Tensor, sums: Tensor, is_sample: Tensor) -> Tensor:
    """Sums of rises with a limited share of those before and behind the sample.

    Args:
        rises: From each point to the next, in rows that are all the same, shape (intervals, n).
        sums: Of them up to each point, likewise.
        is_sample: Whether a point is of the sample and no anchor, shape (n,).
    """
    before = sums - rises
    low = torch.where(is_sample, before, float("inf")).amin(-1, keepdim=True)  # at the first element of the sample
    high = torch.where(is_sample, before, -float("inf")).amax(-1, keepdim=True)  # at the last
    own = torch.minimum(torch.maximum(sums, low), high) - low
    beyond = sums - own
    allowed = (_SHARE[0] / _SHARE[1]) * (high - low)
    share = (allowed / (sums[:, -1:] - (high - low))).clamp(max=1)  # 0 by 0 multiplies zeros only
    return own + torch.where(beyond > 0, share * beyond, 0.0)


def _middle_before(position: Tensor, number: Tensor, points: Tensor) -> Tensor:
    """The middle between the point at each position and the one before it.

    As a sum, which Inductor keeps: an expression it would compute again for each element that is compared.
    """
    beside = (number == position) | (number == position - 1)
    return torch.where(beside, points / 2, 0.0).sum(-1, keepdim=True)


def _from_gray_code(code: Tensor) -> Tensor:
    """The rank of a code of at most 4 bits."""
    halved = torch.bitwise_xor(code, code >> 1)
    return torch.bitwise_xor(halved, halved >> 2)
