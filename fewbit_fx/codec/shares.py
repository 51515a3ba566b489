"""Codes of shares of a whole, such as the probabilities of a softmax: the smaller a share, the closer the levels.

The gradient of a softmax p is p (g - sum(p g)). Where one share of a row is nearly 1, as in most heads of a pretrained
transformer, it comes from the others: even levels, of which the least is 1/255, are 0 for most of them. So levels are
as far apart as they are large. They are the floating-point numbers with m digits behind the point, from the block's
largest share downwards, and 0:

    k = 127 2^m - (the bits of r as float32, rounded to m of its 23 digits)           r ~ the number of those bits

with r the ratio to that share, and k from 0 to 2^b - 2; 2^b - 1 stands for 0, and for what is smaller. m is b - 4 for 6
bits and more, which reach down to 2^-16: a share is off by 1.2 % with 8 bits, 4.7 % with 6, whatever its size. 5 and 4
bits reach down to 2^-7 and 2^-6, fewer hardly anywhere. It is a matter of shifts and adds of integers, the same bits on
every device.

Shares that are alike would all be rounded the same way: of a language model that has just begun, the probability of a
class is much the same for every token. So rounding is dithered, by a number that follows from the element's place
(``dither.fixed``): it is added before bits are rounded down, and taken off when they are decoded. Whatever the share,
the error of its bits is then as likely to be any of those that rounding to the nearest can have. (So is that of the
share itself, but for those within half a step of a power of two, above which steps are twice as wide: their mean is off
by up to an eighth of a step.) Codes start at 1 then, for 0 is that of the largest, which is as exact as the scale; none
is decoded to more than that.

A decode of 8 bits has 25 operations: beyond some thirty, as those of fewer bits have, Inductor writes what is decoded
to a GPU's memory before it is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DIGITS = {2: 0, 3: 0, 4: 1, 5: 2, 6: 2, 7: 3, 8: 4}
"""m, by bits: the best for rows of normal logits, of standard deviations from 0.5 to 8."""
_MANTISSA = 23  # digits that float32 has
_ONE = 127  # its exponent field for numbers from 1 to 2
_BITS_OF_LARGEST = (_ONE << _MANTISSA) + (1 << (_MANTISSA - 8))  # of 1 + 2^-8


def share_codes(ratios: Tensor, bits: int, offsets: Tensor) -> Tensor:
    """The codes of numbers from 0 on, of which those below 1 are not the largest of their block.

    Args:
        ratios: float32 of any shape. All from 1 on, and NaN, has the code of 1 + 2^-8.
        bits: Bits of a code, 2 to 8.
        offsets: Of the same shape, from 0 to :func:`unit_of` (``dither.fixed``).

    Returns:
        Whole numbers from -2^(b-1) to 2^(b-1) - 1, float32 of the same shape.
    """
    return _code(torch.where(ratios < 1, _steps_down(ratios, bits, offsets) + 1, 0), bits)


def random_share_codes(ratios: Tensor, bits: int, dither: Tensor) -> Tensor:
    """The codes of numbers from 0 to 1, at random, so that the mean of what they stand for is right.

    Args:
        ratios: float32 of any shape. What is above 1, and NaN, has the code of 1.
        bits: Bits of a code, 2 to 8.
        dither: A number from 0 to 1 for each.
    """
    near = _steps_down(ratios, bits, (dither * unit_of(bits)).to(torch.int32))
    least, of_zero = _least(bits), 2**bits - 1
    small = torch.where(dither * least < ratios, of_zero - 1, of_zero)
    return _code(torch.where(ratios < least, small.to(torch.int32), near), bits)


def _steps_down(ratios: Tensor, bits: int, rest: Tensor) -> Tensor:
    """How many levels of m digits below 1, int32: ``rest`` is added to the bits, which are rounded down then."""
    digits = DIGITS[bits]
    exact = ratios.abs().view(torch.int32).clamp_max(_ONE << _MANTISSA)
    return (_ONE << digits) - ((exact + rest) >> (_MANTISSA - digits))


def _code(number: Tensor, bits: int) -> Tensor:
    """k of the module's text as a code."""
    code: Tensor = number.clamp_max(2**bits - 1).to(torch.float32) - 2.0 ** (bits - 1)
    return code


def shares_of(codes: Tensor, bits: int, offsets: Tensor) -> Tensor:
    """The numbers that the codes of :func:`share_codes` stand for; that of 0 is not defined.

    Args:
        codes: float32 of any shape.
        bits: Bits of a code.
        offsets: As they were encoded with.

    Returns:
        float32 of that shape.
    """
    unit = unit_of(bits)
    middle_of_code_0 = _level_of_code_0(bits) + unit + unit // 2
    found = middle_of_code_0 - _units(codes, bits) - offsets
    return found.clamp_max(_BITS_OF_LARGEST).view(torch.float32)


def random_shares_of(codes: Tensor, bits: int) -> Tensor:
    """The same of :func:`random_share_codes`."""
    return (_level_of_code_0(bits) - _units(codes, bits)).view(torch.float32)


def _units(codes: Tensor, bits: int) -> Tensor:
    """So many times :func:`unit_of`, int32."""
    return codes.to(torch.int32) << (_MANTISSA - DIGITS[bits])


def unit_of(bits: int) -> int:
    """How far apart the bits of levels are."""
    return 1 << (_MANTISSA - DIGITS[bits])


def _level_of_code_0(bits: int) -> int:
    """The bits of the level that is 2^(b-1) steps below 1."""
    return (_ONE << _MANTISSA) - (unit_of(bits) << (bits - 1))


def _least(bits: int) -> float:
    """The least level above 0."""
    octaves, place = divmod(2**bits - 2, 2 ** DIGITS[bits])
    return math.ldexp(1 - place * math.ldexp(1, -DIGITS[bits] - 1), -octaves)
