"""Sites at which the backward reads a saved tensor for its own values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from ..reasons import Reason
from .tensor_site import TensorSite


class Reader(IntEnum):
    """What the backward reads a saved tensor for, the most sensitive last.

    LINEAR: a matrix product with a gradient, as for the gradient of a weight.
    CONVOLUTION: the backward of a convolution.
    FACTOR: anything else, such as the product with a gradient that flows on.
    NORM: a normalisation.
    SOFTMAX: attention, or a softmax or cross entropy in plain operations.
    """

    LINEAR = 0
    CONVOLUTION = 1
    FACTOR = 2
    NORM = 3
    SOFTMAX = 4


READER_NAMES = {
    Reader.LINEAR: "linear input",
    Reader.CONVOLUTION: "convolution input",
    Reader.FACTOR: "factor",
    Reader.NORM: "norm input",
    Reader.SOFTMAX: "softmax",
}


@dataclass(frozen=True)
class ValueSite(TensorSite):
    """A tensor that the cut saves, or the probabilities that the backward computes from logits.

    Attributes:
        reader: What reads it, the most sensitive of several readers.
        kept_as: Why its values are left exact whatever the options say; None where a code may stand for them.
        shares: Whether its values are shares of a whole, or multiples of them: none is negative.
        amplification: How much larger than the error of its codes the error of what gradients meet may be.
    """

    reader: Reader
    kept_as: Reason | None = None
    shares: bool = False
    amplification: float = 1.0

    @property
    def is_last_resort(self) -> bool:
        """Yes: a code of what is computed from the values is smaller, where that alone is read."""
        return True

    @property
    def function(self) -> str:
        """What reads it, such as ``linear input``."""
        return READER_NAMES[self.reader]
