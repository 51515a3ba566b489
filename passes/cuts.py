"""The cuts of a joint graph: torch.compile's own, and leaner ones that compute cheap operations again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from fewbit_fx.torch_private.graphs import HigherOrderOperator, OpOverload, argument
from fewbit_fx.torch_private.inductor import (
    cheap_recomputation,
    has_a_budget,
    min_cut_rematerialization_partition,
    no_budget_of_zero,
)
from fewbit_fx.torch_private.sizes import has_known_size, hint, storage_nbytes

from .graph import LOOKUP, aten, closure, descendants, draws_numbers, is_local, is_view, prims, tangents, value_of
from .original_names import note_names, with_original_names
from .partition import Partition
from .splice import copy_module
from .written_inputs import readers, written_inputs

_MARK = "fewbit_marked"  # key of a node's metadata while a graph is cut
_SAVED = {"recompute": CheckpointPolicy.MUST_SAVE, _MARK: True}
_AGAIN = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, _MARK: True}
_GATHERING = frozenset({aten.index.Tensor, aten.gather.default, aten.embedding.default})
_LINKS_IN_A_ROW = 1  # of what is carried from layer to layer, that may be computed again


def own_cut(gm: fx.GraphModule, joint_inputs: Sequence[object], alive: tuple[int, ...], **kwargs: Any) -> Partition:
    """Cut a joint graph as torch.compile does. It is left without duplicates.

    It differs from torch's where torch's gradient is wrong. Under a budget torch draws random numbers anew in the
    backward: dropout then has two masks (pytorch 190717). Here they are saved, or the seeds that they are made of. And
    where the graph writes to an input, torch may save that input, and compute again from it what the forward has
    computed before it was written to (pytorch 197039). Here what was computed is saved.

    Args:
        gm: The joint graph.
        joint_inputs: Its inputs.
        alive: Positions of the inputs that live anyway.
        **kwargs: What Inductor passes to a partitioner.
    """
    note_names(gm.graph)
    _keep_out(gm.graph, written_inputs(gm.graph))
    drawn = _mark_drawn_numbers(gm.graph) if has_a_budget(gm.graph) else False
    with no_budget_of_zero() if drawn else contextlib.nullcontext():
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
    for graph in (gm.graph, forward.graph, backward.graph):
        _unmark(graph)
    return Partition(forward, backward, kwargs["num_fwd_outputs"], alive)


def leaner_cuts(
    gm: fx.GraphModule,
    joint_inputs: Sequence[object],
    alive: tuple[int, ...],
    kept_out: Collection[int] = (),
    **kwargs: Any,
) -> Iterator[tuple[Partition, fx.Graph]]:
    """Cut a joint graph with torch's own algorithm, which may compute every cheap operation again.

    Cheap is what computes each element from few others: pointwise operations, views and copies. Matrix products,
    convolutions, attention, reductions, random numbers and what is not known are kept: a mask of dropout then takes
    a bit. The graph is used up.

    Args:
        gm, joint_inputs, alive, **kwargs: As of :func:`own_cut`.
        kept_out: Positions of inputs from which the backward computes nothing again.

    Yields:
        Each cut with its joint graph, but for one whose backward would draw random numbers anew all the same. There
        are two where wider copies are of views: a view keeps its whole storage, which pays where others keep it too.
    """
    if not all(has_known_size(n) for n in gm.graph.nodes if n.op == "call_function"):
        return  # as in the trace of torch.func.linearize: torch's algorithm would raise where it may compute more again
    # With nodes marked, a budget may save a tuple whole, which is no tensor.
    choices = [None] if has_a_budget(gm.graph) else _choices(gm.graph)
    for i, again in enumerate(choices):
        uncut = gm if i == len(choices) - 1 else copy_module(gm)  # a cut changes its graph
        _keep_out(uncut.graph, kept_out)
        if again:
            _mark(uncut.graph, again)
        with cheap_recomputation(all_unmarked=again is not None):
            partition = with_original_names(own_cut(uncut, joint_inputs, alive, **kwargs), uncut.graph)
        if not _draws_anew(partition.backward.graph):
            yield partition, uncut.graph


def _draws_anew(backward: fx.Graph) -> bool:
    """Whether a backward has random numbers of the forward drawn once more.

    What works on gradients is not meant: a GPU's backward of attention is tagged as if it drew numbers, though it is
    given the state of the generator.
    """
    gradients = descendants(tangents(backward))
    return any(draws_numbers(n) for n in backward.nodes if n not in gradients)


def _choices(graph: fx.Graph) -> Sequence[Callable[[fx.Node], bool]]:
    """Which cheap operations torch's rules are not asked about: one choice, or two where they differ."""
    differ = any(_is_wider_copy(n) and not _has_more_than_its_source(n) for n in graph.nodes)
    return [_is_wider_copy, _has_more_than_its_source] if differ else [_is_wider_copy]


def _keep_out(graph: fx.Graph, inputs: Collection[int]) -> None:
    """Save what is computed from some inputs, rather than compute it again from them."""
    gradients = descendants(tangents(graph)) if inputs else set()
    for node in readers(graph, inputs):
        if node.op == "call_function" and node not in gradients and not node.meta.get("recompute"):
            for part in _parts(node):
                part.meta |= _SAVED


def _mark(graph: fx.Graph, again: Callable[[fx.Node], bool]) -> None:
    """Mark as checkpoint policies do, but for what a policy of the user's has marked.

    Args:
        graph: A joint graph.
        again: Whether a cheap operation is to be computed again.
    """
    carried = _carried_far(graph)
    views = _views_for_gradients(graph, carried)  # torch's algorithm would save them as if they were other tensors
    for node in graph.nodes:
        if node.op == "call_function" and not node.meta.get("recompute"):
            if node in carried or not _is_cheap(node):
                node.meta |= _SAVED
            elif node in views or again(node):
                node.meta |= _AGAIN


def _carried_far(graph: fx.Graph) -> set[fx.Node]:
    """Cheap operations that are not to be computed again, as it would take the same of the layer before.

    A residual connection joins what a layer is given with what the layer has computed of it. From one such sum the next
    one may be computed again. Of many in a row the backward, which needs the last of them first, would compute all at
    its beginning, and hold them all. torch's own rule leaves that out too, and more: whatever reads a tensor that is
    read far before, as all layers read the sines of rotary embeddings.
    """
    depth: dict[fx.Node, int] = {}  # expensive operations in a row before a node
    links: dict[fx.Node, int] = {}  # connections over such, in a row
    carried: set[fx.Node] = set()
    for node in graph.nodes:
        sources = [n for n in node.all_input_nodes if _is_most_of(n, node)]
        expensive = node.op == "call_function" and not _is_cheap(node)
        depth[node] = max((depth[n] for n in sources), default=0) + expensive
        joins = any(0 < depth[n] < depth[node] for n in sources)
        links[node] = 0 if expensive else max((links[n] for n in sources), default=0) + joins
        if links[node] > _LINKS_IN_A_ROW:
            carried.add(node)
            links[node] = 0
    return carried


def _views_for_gradients(graph: fx.Graph, nodes: Collection[fx.Node]) -> set[fx.Node]:
    """The views of some nodes that operations on gradients read, and those that such views are of."""
    gradients = descendants(tangents(graph))
    views = closure(nodes, lambda n: [user for user in n.users if is_view(user)]).difference(nodes)
    read = [view for view in views if not gradients.isdisjoint(view.users)]
    return closure(read, lambda n: views.intersection(n.all_input_nodes))


def _is_most_of(source: fx.Node, node: fx.Node) -> bool:
    """Whether a tensor has more than half as many elements as what follows from it."""
    x, y = value_of(source), value_of(node)
    if not isinstance(x, Tensor):
        return False
    return not isinstance(y, Tensor) or 2 * hint(x.numel()) > hint(y.numel())


def _mark_drawn_numbers(graph: fx.Graph) -> bool:
    """Let no random number of the forward be drawn anew, but for those that a checkpoint has marked.

    Returns:
        Whether there are any.
    """
    gradients, marked = descendants(tangents(graph)), False
    for node in graph.nodes:
        if node.op != "call_function" or not draws_numbers(node) or node.meta.get("recompute"):
            continue
        if argument(node, "dropout_p") != 0:  # attention is tagged where it drops nothing, too
            for part in _parts(node):
                if part not in gradients:
                    part.meta |= _SAVED
                    marked = True
    return marked


def _parts(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operation makes: a tuple of them is not saved whole."""
    return [node] if isinstance(value_of(node), Tensor) else list(node.users)


def _unmark(graph: fx.Graph) -> None:
    """Else the passes would take it for the user's."""
    for node in graph.nodes:
        if node.meta.pop(_MARK, False):
            del node.meta["recompute"]


def _is_wider_copy(node: fx.Node) -> bool:
    """Such as the float32 copy that an adapter reads of what a frozen layer reads in bfloat16.

    torch's rules save it where the narrow tensor is read before it, elsewhere.
    """
    if node.target is not prims.convert_element_type.default:
        return False
    copy, source = value_of(node), value_of(node.all_input_nodes[0])
    return bool(source.dtype.is_floating_point and copy.dtype.itemsize > source.dtype.itemsize)


def _has_more_than_its_source(node: fx.Node) -> bool:
    return _is_wider_copy(node) and storage_nbytes(node) > storage_nbytes(node.all_input_nodes[0])


def _is_cheap(node: fx.Node) -> bool:
    if isinstance(node.target, HigherOrderOperator):
        return False  # a region, a loop, a kernel of the user's: whatever it has within
    if not isinstance(node.target, OpOverload):
        return True  # arithmetic of sizes, and parts of tuples
    if node.target is LOOKUP or node.target.is_view or node.target in _GATHERING:
        return True
    if is_local(node):
        return True
    makes_constant = not any(isinstance(value_of(n), Tensor) for n in node.all_input_nodes)
    return makes_constant and not draws_numbers(node)
