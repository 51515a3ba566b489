"""What sites have in common at which a whole tensor of the forward is stored in another form for all its readers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .site import Site


@dataclass(frozen=True)
class TensorSite(Site):
    """A tensor of the forward that the backward reads.

    Attributes:
        node: The tensor.
    """

    node: fx.Node

    @property
    def anchor(self) -> fx.Node:
        """The tensor."""
        return self.node

    @property
    def stored(self) -> fx.Node:
        """The tensor."""
        return self.node

    @property
    def determined_by(self) -> tuple[fx.Node, ...]:
        """The tensor."""
        return (self.node,)

    @property
    def exact_inputs(self) -> tuple[fx.Node, ...]:
        """The tensor."""
        return (self.node,)

    @property
    def coded_inputs(self) -> tuple[fx.Node, ...]:
        """Nothing, because the tensor follows from its code alone."""
        return ()

    @property
    def replaced(self) -> fx.Node:
        """The tensor, for all its readers."""
        return self.node

    def place(self, replaced: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Before the first operation that reads the tensor."""
        readers = list(replaced.users)
        return min(readers), readers[0]
