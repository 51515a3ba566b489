"""A few elements of a tensor, from all over it."""

from __future__ import annotations

from itertools import cycle

from torch import Tensor

# Multiples of the golden ratio, and of roots of primes, spread evenly; in units of 2^-32.
_STRIDES = (0x9E3779B1, 0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A)


def elements_all_over(x: Tensor, number: Tensor) -> Tensor:
    """The element of each number: those of 0, 1, ... are spread over every dimension, in every step the same.

    Args:
        x: Tensor of any shape, not empty.
        number: int64, shape (n,).

    Returns:
        Tensor of shape (n,). Of less than n elements some are there more than once.
    """
    # Multiples of a stride, modulo 1 in units of 2^-32, spread over each dimension.
    where = tuple((number * stride) % 2**32 * size >> 32 for size, stride in zip(x.shape, cycle(_STRIDES)))
    return x[where] if where else x.expand(len(number))
