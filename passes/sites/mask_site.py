"""Sites at which the backward reads a boolean tensor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..derivative import Derivative
from ..function_names import activation_name, comes_from_random_numbers
from .site import Site


@dataclass(frozen=True)
class MaskSite(Site):
    """A boolean tensor of the forward that the backward reads.

    Attributes:
        mask: The boolean node.
        derivative: The factor that it alone decides, as a function of a float tensor, where it does.
    """

    mask: fx.Node
    derivative: Derivative | None = None

    @property
    def anchor(self) -> fx.Node:
        """The mask."""
        return self.mask

    @property
    def stored(self) -> fx.Node:
        """The mask."""
        return self.mask

    @property
    def determined_by(self) -> tuple[fx.Node, ...]:
        """The mask."""
        return (self.mask,)

    @property
    def exact_inputs(self) -> tuple[fx.Node, ...]:
        """The mask."""
        return (self.mask,)

    @property
    def coded_inputs(self) -> tuple[fx.Node, ...]:
        """Nothing, because the mask follows from its code alone."""
        return ()

    @property
    def replaced(self) -> fx.Node:
        """The mask."""
        return self.mask

    def place(self, replaced: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Before the first operation that reads the mask."""
        readers = list(replaced.users)
        return min(readers), readers[0]

    @property
    def function(self) -> str:
        """The activation's name, ``dropout`` or ``mask``."""
        if comes_from_random_numbers(self.mask):
            return "dropout"
        return (self.derivative and activation_name(self.derivative)) or "mask"
