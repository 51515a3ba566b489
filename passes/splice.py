"""Traces of functions, and their splicing into a graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fewbit_fx.torch_private.graphs import inductor_decompositions, make_graph_module
from fewbit_fx.torch_private.modes import mode_of

from .graph import output_values, placeholders, value_of

# What tells the user's place in the model; new nodes take it from the node they stand beside.
_PROVENANCE = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr", "autograd_backward")


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
    """Describe a node's value: all that a trace depends on, as a hashable tuple."""
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
    """Insert a trace into a graph, with storages of their own for its outputs.

    Args:
        traced: The result of :func:`trace` on inputs of the same description.
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
                value = value_of(node)
                new.meta = {**provenance, "val": _with_own_storage(value) if node in wanted else value}
                environment[node] = new
    return [environment[n] for n in results]


def _with_own_storage(value: Tensor) -> Tensor:
    """What else splices share; the graph's inner values need it not, for Inductor computes them anew."""
    with mode_of(value):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
