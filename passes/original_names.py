"""The names of a joint graph, given back to the nodes of the graphs that torch cuts out of it.

Passes look nodes of the joint graph up by name in these graphs. torch keeps the names, but where it saves the state of
a random number generator, as for attention within a checkpoint: what draws is replaced there, by nodes of new names,
which may be those of other tensors. The metadata of a node goes along with all copies of it, and with what replaces it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, fx

from fewbit_fx.torch_private.graphs import make_graph_module

from .graph import output_values, placeholders
from .partition import Partition

_NAME = "fewbit_name"  # key of a node's metadata: its name in the joint graph


def note_names(joint: fx.Graph) -> None:
    """Note the name of each node, before the graph is cut."""
    for node in joint.nodes:
        node.meta[_NAME] = node.name


def with_original_names(cut: Partition, joint: fx.Graph) -> Partition:
    """The same cut, in whose graphs each node that was one of the joint graph has its name, and no other node has.

    What the forward saves has the name of the backward's input, also where it was none of the joint graph's.

    Args:
        cut: A cut of the joint graph.
        joint: The joint graph as the cut left it.
    """
    own = {n.meta[_NAME]: n.name for n in joint.nodes if _NAME in n.meta and n.op != "output"}
    backward = _renamed(cut.backward, own, {})
    saved, taken = output_values(cut.forward.graph)[cut.num_fwd_outputs :], placeholders(backward.graph)
    pairs = zip(filter(_is_tensor, saved), filter(_is_tensor, taken), strict=False)  # the tangents come last
    forward = _renamed(cut.forward, own, {one: other.name for one, other in pairs})
    return replace(cut, forward=forward, backward=backward)


def _renamed(gm: fx.GraphModule, own: Mapping[str, str], others: Mapping[fx.Node, str]) -> fx.GraphModule:
    """The graph with names by what was noted, and for nodes of which nothing was, by ``others``."""
    counts = Counter(n.meta.get(_NAME) for n in gm.graph.nodes)
    wanted = {}
    for node in gm.graph.nodes:
        noted = node.meta.get(_NAME)
        if noted in own and counts[noted] == 1:
            wanted[node] = own[noted]
        else:
            node.meta.pop(_NAME, None)
    taken = set(own.values())
    free = {n: f"{n.name}_of_the_cut" if n.name in taken else n.name for n in gm.graph.nodes}
    names = {n: wanted.get(n) or others.get(n) or free[n] for n in gm.graph.nodes}
    if all(n.name == name for n, name in names.items()):
        return gm
    graph = fx.Graph()
    environment: dict[fx.Node, fx.Node] = {}
    for node, name in names.items():
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: environment[n])
        environment[node] = graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        environment[node].meta = copy.copy(node.meta)
    return make_graph_module(gm, graph)


def _is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def has_original_name(node: fx.Node) -> bool:
    """Whether a node of a cut's graph is known to be the one that the joint graph has by this name."""
    return _NAME in node.meta
