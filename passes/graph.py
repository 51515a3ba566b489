"""Small questions to a graph, and the splicing of traced functions into it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fewbit_fx.torch_private.graphs import OpOverload, inductor_decompositions, make_graph_module
from fewbit_fx.torch_private.sizes import statically_known_true

aten, prims = torch.ops.aten, torch.ops.prims

COPIES = frozenset({aten.clone.default, aten.alias.default})
# Operations that place elements elsewhere, once or often, and compute nothing.
MOVEMENTS = COPIES | {
    aten.expand.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.as_strided.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.cat.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.constant_pad_nd.default,
    aten.index_put.default,
    aten.repeat.default,
}
_FILL_ARGUMENT = {aten.full.default: 1, aten.full_like.default: 1, aten.scalar_tensor.default: 0}
_PROVENANCE = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr", "autograd_backward")


def value_of(node: fx.Node) -> Any:
    """The fake value of a node, or None."""
    return node.meta.get("val")


def constant_value(node: fx.Node) -> float | int | bool | None:
    """The one number that fills this tensor, where the graph states it; else None."""
    if node.op == "call_function" and node.target in _FILL_ARGUMENT:
        filled = node.args[_FILL_ARGUMENT[node.target]]
        if isinstance(filled, (bool, int, float)):
            return filled
    return None


def is_pointwise(node: fx.Node) -> bool:
    """Each output element follows from the elements of the inputs at the same place, without chance."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    tags = node.target.tags
    pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return pointwise or node.target in COPIES


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether both are tensors whose shapes are known to be equal, without a new guard."""
    x, y = value_of(a), value_of(b)
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.dim() != y.dim():
        return False
    return all(statically_known_true(m == n) for m, n in zip(x.shape, y.shape, strict=True))


def tangents(graph: fx.Graph) -> list[fx.Node]:
    """The incoming gradients. AOTAutograd names the placeholders so; the partitioners rely on it too."""
    return [n for n in placeholders(graph) if "tangents" in str(n.target)]


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a graph, in order."""
    return list(graph.find_nodes(op="placeholder"))


def by_name(graph: fx.Graph) -> dict[str, fx.Node]:
    """The nodes of a graph by name. A partition keeps the names of its joint graph."""
    return {n.name: n for n in graph.nodes}


def descendants(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """The roots and all that depends on them."""
    return closure(roots, lambda n: n.users)


def ancestors(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """The roots and all that they depend on."""
    return closure(roots, lambda n: n.all_input_nodes)


def closure(roots: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The roots and all that repeated steps lead to."""
    found: set[fx.Node] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(step(node))
    return found


def output_values(graph: fx.Graph) -> list[Any]:
    """The flat outputs of a graph."""
    (outputs,) = graph.output_node().args
    return list(outputs)  # type: ignore[arg-type]


def after(node: fx.Node) -> fx.Node:
    """The node before which to insert what follows ``node``: the next one behind all placeholders."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares no node, with the same names; tensors are shared."""
    graph = fx.Graph()
    output = graph.output(graph.graph_copy(gm.graph, {}))
    output.meta = copy.copy(gm.graph.output_node().meta)
    return make_graph_module(gm, graph)


def trace(function: Callable[..., Sequence[Tensor]], inputs: Sequence[fx.Node]) -> fx.Graph:
    """The operations of a function of the values of some nodes, as a graph Inductor takes.

    Args:
        function: Takes a tensor (or a SymInt) for each input, returns a sequence of tensors.
        inputs: Nodes with values.
    """
    tracer = make_fx(lambda *args: list(function(*args)), decomposition_table=inductor_decompositions())
    with torch.no_grad():
        return tracer(*[value_of(n) for n in inputs]).graph


def description(node: fx.Node) -> tuple[object, ...]:
    """All of a node's value that a trace depends on; hashable."""
    value = value_of(node)
    if isinstance(value, Tensor):
        return value.dtype, value.device, tuple(map(str, value.shape)), tuple(map(str, value.stride()))
    return (str(value),)


def splice(
    traced: fx.Graph,
    inputs: Sequence[fx.Node],
    before: fx.Node,
    like: fx.Node,
    names: Sequence[str | None] = (None,),
) -> list[fx.Node]:
    """Insert a trace into a graph, with values of its own.

    Args:
        traced: Of :func:`trace`, on inputs of the same description.
        inputs: Nodes of the graph.
        before: Where to insert; every input must come earlier.
        like: The node whose provenance (stack trace, module) the new nodes take.
        names: Names for the outputs, None to let fx choose.
    """
    results = output_values(traced)
    wanted = dict(zip(results, names, strict=True))
    provenance = {key: like.meta[key] for key in _PROVENANCE if key in like.meta}
    environment: dict[fx.Node, fx.Node] = dict(zip(placeholders(traced), inputs, strict=True))
    graph = before.graph
    with graph.inserting_before(before), torch.no_grad():
        for node in traced.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: environment[n])
                name = wanted.get(node) or node.name
                new = graph.create_node(node.op, node.target, args, kwargs, name)
                values, named_values = fx.map_arg((args, kwargs), value_of)
                new.meta = {**provenance, "val": node.target(*values, **named_values)}
                environment[node] = new
    return [environment[n] for n in results]
