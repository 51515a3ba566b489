"""Which nodes of a cut's graphs are the ones that the joint graph has by these names.

Passes look nodes of the joint graph up by name in the graphs that torch cuts out of it, which ``original_names`` has
given back. Where that could not tell, sites are left exact.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from .original_names import has_original_name
from .partition import Partition
from .sites import Site


class SameNames:
    """Compares a joint graph with a cut of it.

    Args:
        joint: The joint graph as the cut left it.
        partition: The cut.
    """

    def __init__(self, joint: fx.Graph, partition: Partition) -> None:
        inputs = {n.name for n in joint.nodes if n.op == "placeholder"}
        self._forward = {n.name for n in partition.forward.graph.nodes}
        self._backward = {n.name for n in partition.backward.graph.nodes}
        self._same_forward = _same(partition.forward.graph, inputs)
        self._same_backward = _same(partition.backward.graph, inputs | self._same_forward)

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


def _same(graph: fx.Graph, inputs: Collection[str]) -> set[str]:
    """The names of the nodes that stand for what the joint graph has by these names.

    Args:
        graph: A graph that was cut out of the joint graph.
        inputs: Names that are known to be the same where they are inputs.
    """
    return {n.name for n in graph.nodes if (n.name in inputs if n.op == "placeholder" else has_original_name(n))}
