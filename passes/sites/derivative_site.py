"""Sites at which the backward multiplies a gradient by a derivative."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from torch import fx

from ..derivative import Derivative
from ..function_names import activation_name, is_product
from .site import Site


class Origin(Enum):
    """The place that the gradient entering a site comes from.

    LAYER: from what follows in the model, such as a matrix product.
    BROADCAST: from fewer numbers, through nothing but pointwise operations: the site is a loss's derivative.
    OUTSIDE: from outside of the graph, through nothing but pointwise operations. What is there is not known.
    """

    LAYER = auto()
    BROADCAST = auto()
    OUTSIDE = auto()


@dataclass(frozen=True)
class DerivativeSite(Site):
    """A region of the backward that multiplies the gradient by a function of one forward tensor.

    Attributes:
        entry: Gradient that flows in.
        exit: Gradient that flows out; the only node of the region that a rewrite replaces.
        source: The forward tensor x.
        sources: The forward tensors that each by itself determine the derivative, x the last of them.
        factors: Forward tensors that the exact region reads, each a function of ``source``.
        derivative: The factor as a function of x.
        is_gate: The factor is a value of the forward, which multiplies another tensor there.
        origin: Where the gradient at the entry comes from.
    """

    entry: fx.Node
    exit: fx.Node
    source: fx.Node
    sources: tuple[fx.Node, ...]
    factors: tuple[fx.Node, ...]
    derivative: Derivative
    is_gate: bool = False
    origin: Origin = Origin.LAYER

    @property
    def anchor(self) -> fx.Node:
        """The exit gradient."""
        return self.exit

    @property
    def stored(self) -> fx.Node:
        """x."""
        return self.source

    @property
    def determined_by(self) -> tuple[fx.Node, ...]:
        """The sources."""
        return self.sources

    @property
    def exact_inputs(self) -> tuple[fx.Node, ...]:
        """The factors."""
        return self.factors

    @property
    def coded_inputs(self) -> tuple[fx.Node, ...]:
        """The entry gradient."""
        return (self.entry,)

    @property
    def replaced(self) -> fx.Node:
        """The exit gradient."""
        return self.exit

    def place(self, replaced: fx.Node) -> tuple[fx.Node, fx.Node]:
        """At the exit."""
        return replaced, replaced

    @property
    def function(self) -> str:
        """The activation's name, ``product`` or ``custom``."""
        if self.is_gate:
            return "product"
        return activation_name(self.derivative) or ("product" if is_product(self.derivative) else "custom")
