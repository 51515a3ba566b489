"""A few elements of a tensor, from all over it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from torch import Tensor

_WORD = 2**32 - 1
# Multiples of the golden ratio, and of roots of primes, spread evenly; in units of 2^-32, modulo 1. As int32: on a GPU
# Inductor multiplies them by numbers of that type, which takes no larger ones and keeps the lower 32 bits of a product.
_STRIDES = (0x9E3779B1 - 2**32, 0x6A09E667, 0xBB67AE85 - 2**32, 0x3C6EF372, 0xA54FF53A - 2**32)


def elements_all_over(x: Tensor, number: Tensor) -> Tensor:
    """The element of each number: those of 0, 1, ... are spread over every dimension, in every step the same.

    Args:
        x: Tensor of any shape, not empty.
        number: int64, shape (n,).

    Returns:
        Tensor of shape (n,). Of less than n elements some are there more than once.
    """
    where = positions_all_over(x.shape, number)
    return x[where] if where else x.expand(len(number))


def positions_all_over(shape: Sequence[int], number: Tensor) -> tuple[Tensor, ...]:
    """Where in a tensor of this shape the elements of :func:`elements_all_over` are, in each dimension."""
    # Multiples of a stride, modulo 1 in units of 2^-32, spread over each dimension. By a mask, which ends what Inductor
    # takes for arithmetic of indices: a remainder, and what is made of it, would be in 32 bits too.
    return tuple((number * stride & _WORD) * size >> 32 for size, stride in zip(shape, cycle(_STRIDES)))
