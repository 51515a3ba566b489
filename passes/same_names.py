"""Which nodes of a cut's graphs are the ones that the joint graph has by these names.

Passes look nodes of the joint graph up by name in the graphs that torch cuts out of it, which ``original_names`` has
given back. Where that could not tell, sites are left exact.
"""

from __future__ import annotations

from collections.abc import Collection, Set

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
        same_forward = _same(partition.forward.graph, inputs)
        self._computable = _computable(joint, {n.name for n in partition.forward.graph.nodes}, same_forward)
        self._backward = {n.name for n in partition.backward.graph.nodes}
        self._same_backward = _same(partition.backward.graph, inputs | same_forward)

    def hold_for(self, site: Site) -> bool:
        """Whether all nodes of a site are, in both graphs, what their names say."""
        forward = (site.stored, *site.exact_inputs, *site.determined_by)
        backward = (site.replaced, *site.coded_inputs)
        return self._computable.issuperset(forward) and all(
            n.name in self._same_backward for n in backward if n.name in self._backward
        )


def _computable(joint: fx.Graph, forward: Set[str], same: Set[str]) -> set[fx.Node]:
    """The nodes of a joint graph that the forward has, or can compute from what it has.

    Args:
        joint: The joint graph.
        forward: The names in the forward.
        same: Those that stand for what the joint graph has by them.
    """
    found: set[fx.Node] = set()
    for node in joint.nodes:  # in order
        if node.name in same if node.name in forward else found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _same(graph: fx.Graph, inputs: Collection[str]) -> set[str]:
    """The names of the nodes that stand for what the joint graph has by these names.

    Args:
        graph: A graph that was cut out of the joint graph.
        inputs: Names that are known to be the same where they are inputs.
    """
    return {n.name for n in graph.nodes if (n.name in inputs if n.op == "placeholder" else has_original_name(n))}
