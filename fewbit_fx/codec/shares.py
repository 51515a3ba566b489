"""Codes of shares of a whole, such as the probabilities of a softmax: the smaller a share, the closer the levels.

The gradient of a softmax p is p (g - sum(p g)). Where one share of a row is nearly 1, as in most heads of a pretrained
transformer, it comes from the others: even levels, of which the least is 1/255, are 0 for most of them. So levels are
as far apart as they are large. They are the floating-point numbers with m digits behind the point, from the block's
largest share downwards, and 0:

    k = 127 2^m - (the bits of r as float32, rounded to m of its 23 digits)           r ~ the number of those bits

with r the ratio to that share, and k from 0 to 2^b - 2; 2^b - 1 stands for 0, and for what is smaller. m is b - 4 for 6
bits and more, which reach down to 2^-16: a share is off by 1.2 % with 8 bits, 4.7 % with 6, whatever its size. Fewer
bits reach down to 2^-8 and 2^-7. It is a matter of shifts and adds of integers, the same bits on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DIGITS = {2: 0, 3: 0, 4: 1, 5: 2, 6: 2, 7: 3, 8: 4}
"""m, by bits: the best for rows of normal logits, of standard deviations from 0.5 to 8."""
_MANTISSA = 23  # digits that float32 has
_ONE = 127  # its exponent field for numbers from 1 to 2


def share_codes(ratios: Tensor, bits: int, dither: Tensor | None = None) -> Tensor:
    """The codes of numbers from 0 to 1.

    Args:
        ratios: float32 of any shape. What is above 1, and NaN, has the code of 1.
        bits: Bits of a code, 2 to 8.
        dither: A number from 0 to 1 for each, to round at random, so that the mean is right; None for the nearest.

    Returns:
        Whole numbers from -2^(b-1) to 2^(b-1) - 1, float32 of the same shape.
    """
    digits, of_zero = DIGITS[bits], 2**bits - 1
    unit = 1 << (_MANTISSA - digits)
    exact = ratios.abs().view(torch.int32).clamp_max(_ONE << _MANTISSA)
    rest = unit // 2 if dither is None else (dither * unit).to(torch.int32)
    below_one = ((_ONE << digits) - ((exact + rest) >> (_MANTISSA - digits))).clamp_max(of_zero)
    if dither is not None:
        least = _least(bits)
        up = torch.where(dither * least < ratios, of_zero - 1, of_zero)
        below_one = torch.where(ratios < least, up.to(torch.int32), below_one)
    codes: Tensor = below_one.to(torch.float32) - 2.0 ** (bits - 1)
    return codes


def shares_of(codes: Tensor, bits: int) -> Tensor:
    """The numbers that the codes of :func:`share_codes` stand for, float32 of their shape; that of 0 is not defined."""
    digits = DIGITS[bits]
    below_one = codes.to(torch.int32) + 2 ** (bits - 1)
    bits_of_levels: Tensor = ((_ONE << digits) - below_one) << (_MANTISSA - digits)
    return bits_of_levels.view(torch.float32)


def _least(bits: int) -> float:
    """The least level above 0."""
    octaves, place = divmod(2**bits - 2, 2 ** DIGITS[bits])
    return math.ldexp(1 - place * math.ldexp(1, -DIGITS[bits] - 1), -octaves)
