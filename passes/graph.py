"""Small questions to a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from fewbit_fx.torch_private.graphs import OpOverload
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
LOOKUP = prims.inductor_lookup_seed.default  # tagged as if it drew numbers
_FILL_ARGUMENT = {aten.full.default: 1, aten.full_like.default: 1, aten.scalar_tensor.default: 0}


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


def draws_numbers(node: fx.Node) -> bool:
    """Whether the values are random numbers, or seeds of them."""
    if not isinstance(node.target, OpOverload) or node.target is LOOKUP:
        return False
    return torch.Tag.nondeterministic_seeded in node.target.tags


def is_local(node: fx.Node) -> bool:
    """Each output element follows from few elements of the inputs: those at its place, or one placed elsewhere."""
    return is_pointwise(node) or node.target in MOVEMENTS


def is_view(node: fx.Node) -> bool:
    """Whether the value is another look at its input's memory."""
    return isinstance(node.target, OpOverload) and node.target.is_view


def is_softmax(node: fx.Node) -> bool:
    """Whether each number is divided by the sum of its row, as at the end of a softmax."""
    if node.target is not aten.div.Tensor:
        return False
    numerator, *total = node.all_input_nodes
    return any(n.target is aten.sum.dim_IntList and n.args[0] is numerator for n in total)


def is_boolean(node: fx.Node) -> bool:
    """Whether the value is a boolean tensor."""
    value = value_of(node)
    return isinstance(value, Tensor) and value.dtype == torch.bool


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


def local_ancestors(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """The roots and what their elements follow from, each from few."""
    return closure(roots, lambda n: n.all_input_nodes if is_local(n) else ())


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
