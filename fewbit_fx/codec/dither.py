"""Uniform numbers to round by, made without a random number generator.

A number is a hash of the place of its element and, for stochastic rounding, of a seed, so that the forward's dropout
draws what it draws without fewbit. The seed is made anew in each step and for each tensor, of two parts: one of
torch.manual_seed and of the rank, read when the compiled code runs, and one of the tensor itself, the bits of 256 of
its elements. So the same seed and the same data give the same codes, also where a step is computed again; steps,
tensors and ranks differ, also where a CUDA graph is replayed.
"""

from __future__ import annotations

import functools
import math
from itertools import cycle

import torch
from torch import Tensor

from fewbit_fx.codec.bitplanes import WORD_BITS
from fewbit_fx.codec.spread import elements_all_over
from fewbit_fx.torch_private.sizes import sizes_of, statically_known_true

_ELEMENTS = 256
_WORD = 2**32 - 1
# Below 2^31, so that a word times one of them is less than 2^63. The last two are after the hash "lowbias32".
_PLACES = (0x1E3779B1, 0x2545F491, 0x3C6EF372 | 1, 0x5851F42D, 0x4F1BBCDD, 0x6C078965)
_FIRST, _SECOND = 0x7FEB352D, 0x046CA68B
_PERIOD = 1021  # blocks: the largest prime of which 32 times it is less than 2^15
_FLIPPED = 27925  # of 400 numbers the best, by how even the results are for each place in a block


@torch.library.custom_op("fewbit_fx::rounding_seed", mutates_args=())
def rounding_seed(device: torch.device) -> Tensor:
    """What torch.manual_seed was last given, and the rank, as a scalar tensor, int64, on a device.

    An operator of its own, because a graph would hold a constant. It does not advance any generator.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    return torch.full((), (torch.initial_seed() + rank * _PLACES[0]) & _WORD, dtype=torch.int64, device=device)


@rounding_seed.register_fake
def _(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


def uniform(seed: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """Numbers from 0 to 1, 1 excluded, a multiple of 2^-24 for each element.

    Args:
        seed: The result of :func:`rounding_seed`.
        x: The tensor that is rounded.
        like: A tensor of the shape of the result, x in blocks.

    Returns:
        float32.
    """
    place = _hash(seed + _of_data(x))
    for size, step, d in zip(like.shape, cycle(_PLACES), range(like.dim())):
        place = place + (torch.arange(size, device=x.device) * step).view(-1, *[1] * (like.dim() - 1 - d))
    return (_hash(place & _WORD) >> 8).to(torch.float32) * 2.0**-24


def fixed(blocks: Tensor, unit: int, before: int = 0) -> Tensor:
    """Numbers from 0 to ``unit``, that excluded, which are the same in the forward and the backward: they need no seed.

    A place times itself, of which some bits are flipped, modulo ``unit``: as if at random, also for places that are so
    and so far apart, such as of one class in the logits of many tokens. So that products have 30 bits, places start
    anew after a prime number of blocks; of places a multiple of 8 * 1021 apart, most numbers are alike. A decode
    computes this for each element, so it is few operations.

    Args:
        blocks: Of shape (..., blocks, any), such as the scales; only shape and device are read.
        unit: A power of two, from 2^19 to 2^23.
        before: How many blocks of the same tensor are before these.

    Returns:
        int32 of shape (..., blocks, 32).
    """
    outer = sizes_of(blocks)[:-1]
    end = before + math.prod(outer)
    arange = functools.partial(torch.arange, dtype=torch.int32, device=blocks.device)
    of_block = arange(_PERIOD) * WORD_BITS
    if not statically_known_true(end <= _PERIOD):
        of_block = of_block.repeat(-(-end // _PERIOD))
    place = of_block[before:end].view(*outer, 1) | arange(WORD_BITS)  # a sum would be one long index of Inductor's
    return place * (place ^ _FLIPPED) & (unit - 1)


def _of_data(x: Tensor) -> Tensor:
    number = torch.arange(_ELEMENTS, device=x.device)
    bits = elements_all_over(x, number).to(torch.float32).view(torch.int32).to(torch.int64) & _WORD
    return _hash((bits + number * _PLACES[1]) & _WORD).sum()


def _hash(word: Tensor) -> Tensor:
    """A word of 32 bits, as int64, to another. No product overflows, which would be undefined in C++."""
    word = ((word ^ (word >> 16)) & _WORD) * _FIRST & _WORD
    word = (word ^ (word >> 15)) * _SECOND & _WORD
    return word ^ (word >> 16)
