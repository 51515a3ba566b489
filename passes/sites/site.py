"""What a site says of itself; everything behind the search for sites asks this and no kinds of sites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import fx

from ..reasons import Reason


class Site(ABC):
    """A place at which the backward can read something else than what torch.compile saves for it.

    Subclasses are frozen dataclasses. Nodes are those of the joint graph; the cut's graphs know them by name.
    """

    @property
    @abstractmethod
    def anchor(self) -> fx.Node:
        """The node that names the site, and tells where in the user's model it comes from."""

    @property
    @abstractmethod
    def stored(self) -> fx.Node:
        """The node of the forward whose value a code stands for."""

    @property
    @abstractmethod
    def determined_by(self) -> tuple[fx.Node, ...]:
        """Nodes of the forward each of which by itself determines what the site needs."""

    @property
    @abstractmethod
    def exact_inputs(self) -> tuple[fx.Node, ...]:
        """Nodes of the forward that the exact backward reads here."""

    @property
    @abstractmethod
    def coded_inputs(self) -> tuple[fx.Node, ...]:
        """Nodes of the backward that it reads here beside the code, once there is one."""

    @property
    @abstractmethod
    def replaced(self) -> fx.Node:
        """The node of the backward in whose place a decoded value is put."""

    @property
    def is_last_resort(self) -> bool:
        """Whether it is coded only where the codes of other sites leave its tensor saved."""
        return False

    @abstractmethod
    def place(self, replaced: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Where the decoded value is computed.

        Args:
            replaced: The backward graph's node of this name.

        Returns:
            The node before which to compute it, and the node whose stack trace and module it takes.
        """

    @property
    @abstractmethod
    def function(self) -> str:
        """The activation's name, or ``dropout``, ``mask``, ``product`` or ``custom``."""


@dataclass(frozen=True)
class Unreadable:
    """A region that multiplies the gradient by something that cannot be read off the graph.

    Attributes:
        exit: The gradient that it computes.
        reason: Why it cannot be read.
        exact_inputs: The nodes of the forward that it reads.
    """

    exit: fx.Node
    reason: Reason
    exact_inputs: tuple[fx.Node, ...] = ()
