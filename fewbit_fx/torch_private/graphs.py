"""Traces of functions, and what Inductor expects of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload  # the types of an operation as a node's target

# Generates code once, when it is called, not at each change.
from torch.fx._lazy_graph_module import _make_graph_module as make_graph_module
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = [
    "HigherOrderOperator",
    "OpOverload",
    "argument",
    "inductor_decompositions",
    "make_graph_module",
    "trace_for_all_shapes",
    "written_arguments",
]


def trace_for_all_shapes(function: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """The ATen operations of a function, with symbolic shapes; real tensors it closes over are constants.

    Tensors that it creates come to be on the device of its argument. The result is a plain Python function:
    Dynamo traces into one wherever it meets it, and not into a GraphModule in a constant's place.
    """
    traced = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(example)
    traced.graph.eliminate_dead_code()
    _follow_the_device(traced.graph, example.device)
    code = traced.graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    constants = SimpleNamespace(**{n.target: getattr(traced, n.target) for n in traced.graph.find_nodes(op="get_attr")})
    run, dims = namespace["forward"], example.dim()
    if any(n.target is torch.ops.aten.sym_size.int for n in traced.graph.nodes):  # it holds for as many dimensions
        return lambda x: run(constants, x.reshape(*[1] * (dims - 1), -1)).reshape(x.shape)
    return lambda x: run(constants, x)


def _follow_the_device(graph: fx.Graph, traced_on: torch.device) -> None:
    """Read the device of new tensors off the argument, where the trace has the example's."""
    (argument,) = graph.find_nodes(op="placeholder")
    with graph.inserting_after(argument):
        device = graph.call_function(getattr, (argument, "device"))
    for node in graph.nodes:
        if node.kwargs.get("device") == traced_on:
            node.kwargs = {**node.kwargs, "device": device}
    if not device.users:
        graph.erase_node(device)


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an ATen operation by its name in the schema; None where the operation has none of that name."""
    assert isinstance(node.target, OpOverload)
    for i, known in enumerate(node.target._schema.arguments):
        if known.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, known.default_value)
    return None


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operation writes to."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return []
    names = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    found = [argument(node, name) for name in names]
    return [n for n in found if isinstance(n, fx.Node)]


def inductor_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """The decompositions that a graph after AOTAutograd has been through; Inductor expects no others."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()
