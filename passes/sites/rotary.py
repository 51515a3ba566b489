"""Keys and queries of attention that are rotated after a bias was added to them, as in Qwen2, GPT-NeoX and Phi.

A softmax does not see what all keys have in common. So the gradient of a bias of keys is 0, and it stays as small as it
was, but where keys are rotated by angles of their own: then a few channels of the bias grow to a hundred times of what
attention tells apart (Qwen2.5, by which codes of its keys are known to fail). Nothing of that is left in codes that
share a scale with such a channel; and errors of what all keys of a row are weighted with meet its size as well.
"""

from __future__ import annotations

import operator
from collections.abc import Set

from torch import Tensor, fx

from ..graph import COPIES, MOVEMENTS, aten, by_name, closure, is_view, local_ancestors, prims, value_of

_BATCHED = frozenset({aten.bmm.default, aten.baddbmm.default})
_PRODUCTS = _BATCHED | {aten.mm.default, aten.addmm.default, aten.convolution.default}
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_LINEAR: frozenset[object] = frozenset(
    (
        *COPIES,
        *MOVEMENTS,
        *_SUMS,
        aten.mul.Tensor,
        aten.neg.default,
        prims.convert_element_type.default,
        operator.getitem,
    )
)


def read_with_rotated_keys(joint: fx.Graph, backward: fx.Graph, gradients: Set[fx.Node]) -> set[str]:
    """Names of what a backward reads in such attentions.

    Of a fused attention it is all that it reads. In plain operations, of which each has an error of its own, it is keys
    and queries.

    Args:
        joint: The joint graph.
        backward: The backward of a cut of it.
        gradients: Its nodes that depend on an incoming gradient.
    """
    nodes = by_name(joint)
    found: set[str] = set()
    for reader in backward.nodes:
        is_fused = "attention" in str(reader.target)
        if reader in gradients and (is_fused or reader.target in _BATCHED):
            read = [n for n in reader.all_input_nodes if n not in gradients]
            keys = [n for n in read if n.name in nodes and _is_rotated_with_bias(nodes[n.name])]
            found |= {n.name for n in local_ancestors(read if is_fused and keys else keys)}
    return found


def _is_rotated_with_bias(node: fx.Node) -> bool:
    """Whether two terms of one product, that has a bias, are added up on the way to a value."""
    sums = (n for n in closure([node], _terms) if n.target in _SUMS)
    return any(_have_one_source(n.all_input_nodes) for n in sums)


def _have_one_source(terms: list[fx.Node]) -> bool:
    one, *others = (set(filter(_is_biased_product, closure([term], _terms))) for term in terms)
    return any(not one.isdisjoint(other) for other in others)


def _terms(node: fx.Node) -> list[fx.Node]:
    """What a value is linear in, element by element."""
    inputs = node.all_input_nodes
    if not (node.target in _LINEAR or is_view(node)) or _is_product(node):
        return []
    factors = [n for n in node.args if isinstance(n, fx.Node)]
    if node.target is aten.mul.Tensor and len(factors) == 2:  # as in a norm, which makes all channels alike
        one, other = (_products_behind(n) for n in factors)
        return [] if one & other else inputs
    return inputs


def _products_behind(node: fx.Node) -> set[fx.Node]:
    """The matrix products that a value is computed from, and not from what is computed from them."""
    return set(filter(_is_product, closure([node], lambda n: [] if _is_product(n) else n.all_input_nodes)))


def _is_product(node: fx.Node) -> bool:
    return node.target in _PRODUCTS or _is_biased_product(node)


def _is_biased_product(node: fx.Node) -> bool:
    """A product to which one number is added for each column, by itself or behind it."""
    inputs = node.all_input_nodes
    if node.target is aten.addmm.default:
        return bool(value_of(inputs[0]).dim() == 1)
    return (
        node.target is aten.add.Tensor and any(map(_is_column_of_numbers, inputs)) and any(map(_is_view_of_mm, inputs))
    )


def _is_column_of_numbers(node: fx.Node) -> bool:
    value = value_of(node)
    return node.op == "placeholder" and isinstance(value, Tensor) and value.dim() == 1


def _is_view_of_mm(node: fx.Node) -> bool:
    while is_view(node):
        node = node.all_input_nodes[0]
    return node.target is aten.mm.default
