"""Sites at which the backward reads a saved tensor for its own values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import fx

from ..reasons import Reason
from .site import Site


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


_NAMES = {
    Reader.LINEAR: "linear input",
    Reader.CONVOLUTION: "convolution input",
    Reader.FACTOR: "factor",
    Reader.NORM: "norm input",
    Reader.SOFTMAX: "softmax",
}


@dataclass(frozen=True)
class ValueSite(Site):
    """A tensor that the cut saves.

    Attributes:
        node: The saved node.
        reader: What reads it, the most sensitive of several readers.
        kept_as: Why its values are left exact whatever the options say; None where a code may stand for them.
    """

    node: fx.Node
    reader: Reader
    kept_as: Reason | None = None

    @property
    def anchor(self) -> fx.Node:
        """The saved node."""
        return self.node

    @property
    def stored(self) -> fx.Node:
        """The saved node."""
        return self.node

    @property
    def determined_by(self) -> tuple[fx.Node, ...]:
        """The saved node."""
        return (self.node,)

    @property
    def exact_inputs(self) -> tuple[fx.Node, ...]:
        """The saved node."""
        return (self.node,)

    @property
    def coded_inputs(self) -> tuple[fx.Node, ...]:
        """Nothing, because the values follow from their code alone."""
        return ()

    @property
    def replaced(self) -> fx.Node:
        """The saved node, for all its readers."""
        return self.node

    @property
    def is_last_resort(self) -> bool:
        """Yes: a code of what is computed from the values is smaller, where that alone is read."""
        return True

    def place(self, replaced: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Before the first operation that reads the values."""
        first = min(replaced.users)
        return first, first

    @property
    def function(self) -> str:
        """What reads it, such as ``linear input``."""
        return _NAMES[self.reader]
