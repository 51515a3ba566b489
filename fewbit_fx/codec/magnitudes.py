"""Magnitudes of float32, compared as a device does it fastest.

Without their sign, numbers are in the order of their bits as integers, and NaN is above infinity. A GPU compares
integers by one instruction, numbers by three, as NaN has to win. A CPU's vectors do it the other way round.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF  # all bits but that of the sign
_MANTISSA = 23  # bits
_EXPONENT_OF_HALF = 126


def compares_integers(device: torch.device) -> bool:
    """Whether a device is faster at comparing integers."""
    return device.type != "cpu"


def largest(blocks: Tensor) -> Tensor:
    """The largest magnitude of each block, shape (..., n) -> (..., 1), NaN where there is one; float32."""
    if not compares_integers(blocks.device):
        return blocks.abs().amax(-1, keepdim=True)
    return (blocks.view(torch.int32) & _MAGNITUDE).amax(-1, keepdim=True).view(torch.float32)


def within(x: Tensor, most: float) -> Tensor:
    """Numbers with their magnitude limited.

    Args:
        x: float32 of any shape.
        most: The largest magnitude, a positive number that is normal in float32, where it is rounded down; infinities
            take it. NaN may become anything.
    """
    if not compares_integers(x.device):
        return x.clamp(-most, most)
    bits = x.view(torch.int32)
    return ((bits & _MAGNITUDE).clamp_max(_bits_of(most)) | (bits & ~_MAGNITUDE)).view(torch.float32)


def _bits_of(number: float) -> int:
    """Of float32, rounded down."""
    half, exponent = math.frexp(number)  # the number is half * 2^exponent, with half from 0.5 to 1
    return (exponent + _EXPONENT_OF_HALF << _MANTISSA) + int((2 * half - 1) * 2**_MANTISSA)
