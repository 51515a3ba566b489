"""The cuts of a joint graph: torch.compile's own, and a leaner one that computes cheap operations again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from fewbit_fx.torch_private.graphs import OpOverload
from fewbit_fx.torch_private.inductor import cheap_recomputation, has_a_budget, min_cut_rematerialization_partition

from .graph import aten, is_local, prims, value_of
from .partition import Partition

_LOOKUP = prims.inductor_lookup_seed.default  # tagged as if it drew numbers
_MARK = "fewbit_marked"  # key of a node's metadata while a graph is cut
_GATHERING = frozenset({aten.index.Tensor, aten.gather.default, aten.embedding.default})


def own_cut(gm: fx.GraphModule, joint_inputs: Sequence[object], alive: tuple[int, ...], **kwargs: Any) -> Partition:
    """Cut a joint graph as torch.compile does. It is left without duplicates.

    Args:
        gm: The joint graph.
        joint_inputs: Its inputs.
        alive: Positions of the inputs that live anyway.
        **kwargs: What Inductor passes to a partitioner.
    """
    forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
    return Partition(forward, backward, kwargs["num_fwd_outputs"], alive)


def leaner_cut(
    gm: fx.GraphModule, joint_inputs: Sequence[object], alive: tuple[int, ...], **kwargs: Any
) -> Partition | None:
    """Cut a joint graph with torch's own algorithm, which may compute every cheap operation again.

    Cheap is what computes each element from few others: pointwise operations, views and copies. Matrix products,
    convolutions, attention, reductions, random numbers and what is not known are kept: a mask of dropout then takes
    a bit. None if the backward would draw random numbers anew all the same. The arguments are those of
    :func:`own_cut`.
    """
    marked = not has_a_budget()  # what that chooses among the marked, it may save whole: a tuple is no tensor
    if marked:
        _mark(gm.graph)
    with cheap_recomputation(all_unmarked=marked):
        partition = own_cut(gm, joint_inputs, alive, **kwargs)
    for graph in (gm.graph, partition.forward.graph, partition.backward.graph):
        _unmark(graph)
    return None if any(map(_draws_numbers, partition.backward.graph.nodes)) else partition


def _mark(graph: fx.Graph) -> None:
    """Mark as checkpoint policies do, but for what a policy of the user's has marked."""
    for node in graph.nodes:
        policy = None if node.op != "call_function" or node.meta.get("recompute") else _policy(node)
        if policy:
            node.meta |= {"recompute": policy, _MARK: True}


def _unmark(graph: fx.Graph) -> None:
    """Else the passes would take it for the user's."""
    for node in graph.nodes:
        if node.meta.pop(_MARK, False):
            del node.meta["recompute"]


def _policy(node: fx.Node) -> CheckpointPolicy | None:
    """A wider copy is never saved: torch's rules would have it so where the narrow one is read before it, elsewhere."""
    if not _is_cheap(node):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE if _is_wider_copy(node) else None


def _is_wider_copy(node: fx.Node) -> bool:
    if node.target is not prims.convert_element_type.default:
        return False
    copy, (source, *_) = value_of(node), node.all_input_nodes
    return bool(copy.dtype.itemsize > value_of(source).dtype.itemsize)


def _is_cheap(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return True  # arithmetic of sizes, and parts of tuples
    if node.target is _LOOKUP or node.target.is_view or node.target in _GATHERING:
        return True
    if is_local(node):
        return True
    makes_constant = not any(isinstance(value_of(n), Tensor) for n in node.all_input_nodes)
    return makes_constant and not _draws_numbers(node)


def _draws_numbers(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload) or node.target is _LOOKUP:
        return False
    return torch.Tag.nondeterministic_seeded in node.target.tags
