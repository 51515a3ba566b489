"""Which nodes of a cut's graphs are the ones that the joint graph has by these names.

Passes look nodes of the joint graph up by name in the graphs that torch cuts out of it. torch keeps the names, but
where it adds operations that save the state of a random number generator, as for attention within a checkpoint: what
is behind them is named anew, and a name may stand for another tensor.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from .graph import by_name
from .partition import Partition
from .sites import Site


class SameNames:
    """Compares a joint graph with a cut of it.

    Args:
        joint: The joint graph as the cut left it.
        partition: The cut.
    """

    def __init__(self, joint: fx.Graph, partition: Partition) -> None:
        own = by_name(joint)
        inputs = {n.name for n in joint.nodes if n.op == "placeholder"}
        self._forward = {n.name for n in partition.forward.graph.nodes}
        self._backward = {n.name for n in partition.backward.graph.nodes}
        self._same_forward = _same(own, partition.forward.graph, inputs)
        self._same_backward = _same(own, partition.backward.graph, inputs | self._same_forward)

    def hold_for(self, site: Site) -> bool:
        """Whether all nodes of a site are, in both graphs, what their names say."""
        forward = (site.stored, *site.exact_inputs, *site.determined_by)
        backward = (site.replaced, *site.coded_inputs)
        return all(map(self._is_same_in_forward, forward)) and all(
            n.name in self._same_backward for n in backward if n.name in self._backward
        )

    def _is_same_in_forward(self, node: fx.Node) -> bool:
        if node.name in self._forward:
            return node.name in self._same_forward
        return all(map(self._is_same_in_forward, node.all_input_nodes))  # from which it can be computed


def _same(own: dict[str, fx.Node], graph: fx.Graph, inputs: Collection[str]) -> set[str]:
    """The names of the nodes that do what the joint graph's do, to nodes of which that is true.

    Args:
        own: The nodes of the joint graph.
        graph: A graph that was cut out of it.
        inputs: Names that are known to be the same where they are inputs.
    """
    same: set[str] = set()
    for node in graph.nodes:
        known = node.name in inputs if node.op == "placeholder" else _is_alike(node, own.get(node.name))
        if known and all(n.name in same for n in node.all_input_nodes):
            same.add(node.name)
    return same


def _is_alike(node: fx.Node, other: fx.Node | None) -> bool:
    """Whether two nodes do the same with inputs of the same names."""
    if other is None or (node.op, node.target) != (other.op, other.target):
        return False
    return [n.name for n in node.all_input_nodes] == [n.name for n in other.all_input_nodes]
