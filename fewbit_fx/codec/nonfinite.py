"""Derivatives that are not finite, within the codes of finite ones: no byte more, and no level less.

NaN and infinities in x make most derivatives NaN. A gradient that stayed finite would hide an overflow from
GradScaler and clip_grad_norm_, and a level of its own for NaN would make the error of 3 bits 1.14 times as large
(and 1 bit has none to spare). So a *word* tells: where one of its 32 elements is not finite, its least significant
plane holds one number, :data:`MARK`, and the other planes, the prefix of the code, tell the elements apart.

    word of finite elements     as it is; should it be MARK, the bit of its first element is flipped
    marked word                 not finite: the reserved prefix
                                finite: its own prefix, or the one beside it in place of the reserved one

Flipping the least significant bit of a Gray code gives a level next to it; a word is MARK by chance once in 2^32.
The finite elements of a marked word keep b - 1 bits. With 1 bit there is no prefix, and all 32 elements of a
marked word are NaN. Where the levels mirror themselves, all this is about the code without its first bit.

All this is arithmetic on words, a 32nd of that on elements. Per element it takes a bit more to pack, whether
the derivative is finite, and when decoding a choice more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewbit_fx.codebooks.sampling import Function

MARK = 0x2F6B93D5  # no pattern that codes of neighbouring elements are likely to make

_INFINITY = 0x7F800000  # the bits of the float32
# More than the widest vectors and their remainder: torch's kernels of ELU and Hardswish differ there, for NaN.
_REPEATED = 43


@dataclass(frozen=True)
class Undefined:
    """The values of x, beyond the real numbers, at which a derivative is not finite.

    Attributes:
        nan: Whether it is not finite at NaN.
        positive, negative: Whether it is not finite at infinity, and at -infinity.
    """

    nan: bool
    positive: bool
    negative: bool

    def spares(self, x: Tensor, signs: bool = False) -> Tensor:
        """Tell the elements at which the derivative is finite.

        Args:
            x: The tensor that is encoded, in float32 or float64.
            signs: Whether to answer by the signs of int32, where x is float32 and that is possible.

        Returns:
            Booleans, or int32 that are negative there.
        """
        if signs and self.nan and self.positive == self.negative:
            return x.abs().view(torch.int32) - (_INFINITY if self.positive else _INFINITY + 1)
        if self.nan and self.positive and self.negative:
            return is_finite(x)
        spared = [x == x] if self.nan else []
        spared += [x != float("inf")] if self.positive else []
        spared += [x != float("-inf")] if self.negative else []
        return functools.reduce(torch.bitwise_and, spared)


def find_undefined(derivative: Function) -> Undefined | None:
    """Find where a derivative is not finite. None if it is finite everywhere, as that of ReLU is.

    Args:
        derivative: Elementwise function of a float64 array. Where it fails, it counts as not finite.
    """
    x = np.tile([np.nan, np.inf, -np.inf], _REPEATED)
    try:
        with np.errstate(all="ignore"):
            values = np.asarray(derivative(x), dtype=np.float64)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # whatever an operation may raise
        return Undefined(True, True, True)
    nan, positive, negative = (not np.isfinite(values[i::3]).all() for i in range(3))
    return Undefined(nan, positive, negative) if nan or positive or negative else None


def is_finite(x: Tensor) -> Tensor:
    """Whether each element is finite, by one comparison."""
    return x.abs() < float("inf")


def reserved_prefix(bits: int) -> tuple[bool, ...]:
    """The prefix, b - 1 bits, of what is not finite: the pair of levels just above the middle.

    Finite elements rather have the levels at both ends, where derivatives settle.
    """
    return tuple(position < 2 for position in range(bits - 1))


def mark(words: Sequence[Tensor], blocks: Tensor) -> list[Tensor]:
    """The words of b planes with those marked that hold an element that is not finite.

    Args:
        words: The words of each of b planes, the most significant first, then the words of what is finite. Each is
            int32 of shape (..., 1, lanes).
        blocks: The tensor that was encoded, as blocks of shape (..., 32, lanes).
    """
    *prefix, last, finite = words
    undefined = torch.bitwise_not(finite)
    poisoned = _in_the_loop_of_lanes(undefined != 0, blocks)
    last = torch.where(poisoned, MARK, torch.bitwise_xor(last, (last == MARK).to(torch.int32)))
    if not prefix:
        return [last]
    if len(prefix) == 1:  # the general case, in one operation
        return [torch.where(poisoned, undefined, prefix[0]), last]
    reserved = reserved_prefix(len(prefix) + 1)
    same = [word if bit else torch.bitwise_not(word) for word, bit in zip(prefix, reserved, strict=True)]
    moved = torch.where(poisoned, functools.reduce(torch.bitwise_and, same, finite), 0)
    beside = [*prefix[:-1], torch.bitwise_xor(prefix[-1], moved)]
    return [*(w | undefined if bit else w & finite for w, bit in zip(beside, reserved, strict=True)), last]


def _in_the_loop_of_lanes(poisoned: Tensor, blocks: Tensor) -> Tensor:
    """Return ``poisoned`` unchanged, but as an expression that reads a row of the blocks.

    On a CPU Inductor then works on the words in the loop that packed them, with vectors of the same length.
    Otherwise it merges the loops over blocks and lanes to one of its own, and reads and writes all planes again.
    """
    if poisoned.shape[-1] == 1:
        return poisoned
    never = blocks[..., :1, :] < float("-inf")
    return torch.bitwise_or(poisoned, never)


def is_marked(words: Tensor) -> Tensor:
    """Whether words of the least significant plane are marked ones."""
    return words == MARK
