"""Codes of a derivative that are right on average: f'(x) is rounded at random to the level above or below it.

The level above is taken with the probability that makes the mean over all seeds f'(x) itself. The outermost levels are
the least and the largest value that f' has anywhere, so that none lies beyond. Those between are values of f' in a
sample of the tensor, its least and its largest among them, as far apart as ``sampled_levels`` has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewbit_fx.codec.bitplanes import PlaneLayout
from fewbit_fx.codec.dither import uniform
from fewbit_fx.codec.encode_decode import (
    at_least_float32,
    bits_of_rank,
    by_code,
    decode_and_multiply,
    encode,
    takes_signs,
)
from fewbit_fx.codec.nonfinite import is_finite
from fewbit_fx.codec.sampled_levels import finite, sums_up_to_each, weigh_rises
from fewbit_fx.codec.spread import elements_all_over

_SAMPLE = 512


@dataclass(frozen=True)
class StochasticScheme:
    """How a derivative is coded at random. A code is the Gray code of a level's rank.

    Attributes:
        code_bits: Bits per code.
        ends: The least and the largest value of the derivative.
        guarded: Whether codes tell what is not finite (``codec/nonfinite.py``).
        relative_error: Predicted for typical pre-activations: root mean square of (level - f'(x)) over that of f'(x).
    """

    code_bits: int
    ends: tuple[float, float]
    guarded: bool
    relative_error: float

    levels = ()  # none that are known before a tensor is
    seeded = True

    @property
    def table_numel(self) -> int:
        """The number of levels that are saved beside the planes."""
        return int(2**self.code_bits)

    def encode(
        self, x: Tensor, derivative: Callable[[Tensor], Tensor], layout: PlaneLayout, seed: Tensor
    ) -> list[Tensor]:
        """The planes of the codes of f'(x), and the levels, ascending.

        Args:
            x: Tensor of any shape and floating point dtype, not empty.
            derivative: f', elementwise, for tensors of the dtype of x.
            layout: Of the planes.
            seed: The result of ``dither.rounding_seed``.
        """
        levels = self.fit(x, derivative)
        bits_of = functools.partial(self._bits_of, x=x, derivative=derivative, levels=levels, seed=seed)
        return [*encode(x, bits_of, layout, self.guarded), levels]

    def decode(self, gradient: Tensor, saved: Sequence[Tensor], layout: PlaneLayout, dtype: torch.dtype) -> Tensor:
        """``gradient * level``, of a dtype; ``saved`` and ``layout`` as for :meth:`encode`."""
        *planes, levels = saved
        table = list(by_code(levels.unbind()))
        return decode_and_multiply(gradient, planes, table, layout, dtype, guarded=self.guarded)

    def fit(self, x: Tensor, derivative: Callable[[Tensor], Tensor]) -> Tensor:
        """The levels for a tensor, shape (2^b,), ascending. Arguments are those of :meth:`encode`."""
        number, rank = torch.arange(_SAMPLE, device=x.device), torch.arange(self.table_numel, device=x.device)
        drawn = finite(elements_all_over(x, number))
        values, _ = torch.sort(finite(at_least_float32(derivative(drawn))))
        rises = weigh_rises(values[(number + 1).clamp(max=_SAMPLE - 1)] - values)
        before = sums_up_to_each(rises) - rises
        wanted = before[-1] * ((rank - 1) / max(self.table_numel - 3, 1)).unsqueeze(-1)
        position = (before < wanted).sum(-1, keepdim=True)
        inner = torch.where(number == position, values, 0.0).sum(-1)
        low, high = self.ends
        return torch.where(rank == 0, low, torch.where(rank == self.table_numel - 1, high, inner))

    def _bits_of(
        self, blocks: Tensor, x: Tensor, derivative: Callable[[Tensor], Tensor], levels: Tensor, seed: Tensor
    ) -> list[Tensor]:
        """The bits of the codes, the most significant first; where guarded, a last one says what is finite."""
        values = at_least_float32(derivative(blocks))
        dither, signs = uniform(seed, x, blocks).to(values.dtype), takes_signs(blocks, compiled=True)
        thresholds = [low + dither * (high - low) for low, high in pairwise(levels.unbind())]
        bits = bits_of_rank(blocks, values, thresholds, signs)
        return [*bits, is_finite(values)] if self.guarded else bits
