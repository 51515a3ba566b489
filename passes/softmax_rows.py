"""The gradient of a softmax whose probabilities are decoded.

With respect to the logits it is p (g - s), where s = sum(p g) of a row. As the sum of p is 1, what all g of a row have
in common changes nothing. Attention's g have a lot in common where its values are alike; and the sum of decoded p is 1
but for some thousandths, which times that may be more than all the rest. So s is divided by the sum of p:

    before   t = g * p;  s = sum(t);                   g' = t - p * s
    after    t = g * p;  s = sum(t) / sum(p);          g' = t - p * s

No kernel is added: both are sums of the same rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .graph import COPIES, aten, by_name, descendants, is_softmax, local_ancestors, prims, tangents, value_of
from .splice import after, description, splice, trace


@dataclass(frozen=True)
class Row:
    """Where a backward sums the rows of p g.

    Attributes:
        total: The name of the sum, which keeps its dimension.
        factor: Which factor of the product is p, 0 or 1.
    """

    total: str
    factor: int


def softmax_rows(joint: fx.Graph, backward: fx.Graph, decoded: Set[str]) -> Iterator[Row]:
    """Where a backward has the gradient of a softmax whose probabilities follow from decoded values.

    Args:
        joint: The joint graph.
        backward: The backward of a cut of it, before it is rewritten.
        decoded: Names of the values in it that codes are to take the place of.
    """
    nodes, gradients = by_name(joint), descendants(tangents(backward))

    def is_row(total: fx.Node, p: object) -> bool:
        if not isinstance(p, fx.Node) or p in gradients or not _meets_again(p, total):
            return False
        return _is_softmax_over(nodes.get(p.name), _dims(total)) and _follows_from(p, decoded)

    for total in backward.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        product, *_, keeps_dim = total.args
        if isinstance(product, fx.Node) and product.target is aten.mul.Tensor and keeps_dim is True:
            yield from (Row(total.name, i) for i, p in enumerate(product.args) if is_row(total, p))


def balance(backward: fx.GraphModule, rows: Iterable[Row]) -> None:
    """Divide the sums of a rewritten backward by those of its probabilities."""
    nodes, traces = by_name(backward.graph), dict[object, fx.Graph]()
    for row in rows:
        total = nodes[row.total]
        dims, p, users = _dims(total), _factor(total, row.factor), list(total.users)
        key = tuple(dims), description(total), description(p)
        if key not in traces:
            traces[key] = trace(functools.partial(_balanced, dims=dims), [total, p])
        (divided,) = splice(traces[key], [total, p], after(total), total)
        for user in users:
            user.replace_input_with(total, divided)
    backward.recompile()


def balanced(total: Tensor, p: Tensor, dims: list[int]) -> Tensor:
    """A sum of p g, divided by that of p; a row that is all masked has neither."""
    whole = p.sum(dims, keepdim=True)
    return total / torch.where(whole > 0, whole, 1.0)


def _balanced(total: Tensor, p: Tensor, dims: list[int]) -> list[Tensor]:
    return [balanced(total, p, dims)]


def _dims(total: fx.Node) -> list[int]:
    """The dimensions that it is a sum over."""
    dims = total.args[1]
    assert isinstance(dims, (list, tuple)), "as the schema of the operation has it"
    return [int(d) for d in dims]  # type: ignore[arg-type]


def _factor(total: fx.Node, number: int) -> fx.Node:
    """A factor of the product that it is a sum of."""
    (product,) = total.all_input_nodes
    factor = product.args[number]
    assert isinstance(factor, fx.Node), "a tensor"
    return factor


def _meets_again(p: fx.Node, total: fx.Node) -> bool:
    """Whether a sum is multiplied by p, as in a softmax's gradient."""
    again = {p, *(user for user in p.users if user.target is aten.neg.default)}
    return any(not again.isdisjoint(user.all_input_nodes) for user in total.users)


def _is_softmax_over(node: fx.Node | None, dims: list[int]) -> bool:
    """Whether it is the result of a softmax over these dimensions, in whatever precision."""
    while node is not None and (node.target in COPIES or node.target is prims.convert_element_type.default):
        (node,) = node.all_input_nodes
    if node is None or not is_softmax(node):
        return False
    rank, (_, total) = value_of(node).dim(), node.all_input_nodes
    return [d % rank for d in _dims(total)] == [d % rank for d in dims]


def _follows_from(p: fx.Node, decoded: Set[str]) -> bool:
    return any(node.name in decoded for node in local_ancestors([p]))
