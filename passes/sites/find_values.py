"""Find the saved tensors of a cut that could be coded for their own values, and what reads each."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Set

import torch
from torch import Tensor, fx

from fewbit_fx.torch_private.graphs import OpOverload
from fewbit_fx.torch_private.sizes import hint, storage_key

from ..graph import (
    COPIES,
    aten,
    by_name,
    closure,
    constant_value,
    descendants,
    is_local,
    is_pointwise,
    is_softmax,
    is_view,
    output_values,
    placeholders,
    prims,
    same_shape,
    tangents,
    value_of,
)
from ..partition import Partition
from ..reasons import Cause, Reason
from .amplification import amplification
from .rotary import read_with_rotated_keys
from .value_site import Reader, ValueSite

DATA, STATISTIC, INTEGER = Reason(Cause.DATA), Reason(Cause.STATISTIC), Reason(Cause.INTEGER)
LOSS, ROTATED = Reason(Cause.LOSS), Reason(Cause.ROTATED)
_PRODUCTS = frozenset({aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.linear, aten._scaled_mm, aten._grouped_mm})
_REDUCTIONS = frozenset(
    {aten.sum, aten.mean, aten.var, aten.var_mean, aten.std, aten.amax, aten.amin, aten.max, aten.logsumexp, aten.norm}
) | {aten.linalg_vector_norm, aten.prod}
_ROOTS = frozenset({aten.rsqrt, aten.sqrt, aten.reciprocal})
_FEWER = 8  # a statistic has at most this fraction of the elements that it was computed from


def find_values(joint: fx.Graph, partition: Partition) -> list[ValueSite]:
    """The tensors that a cut saves, but for masks, in the order in which it saves them.

    Left exact are integers, inputs of the graph that need no gradient (data, which the caller keeps), and statistics
    such as the variance of a norm: small, and read by many elements each. What lives anyway, as parameters do, is
    no site. In place of the logits of a softmax stand its probabilities, or multiples of them: the gradient is linear
    in them, but exponential in the logits, whose range grows in training. They have codes of their own (``shares``).
    Keys that are rotated after a bias was added are exact (``rotary``).

    Args:
        joint: The joint graph of the cut.
        partition: The cut.
    """
    nodes, data = by_name(joint), _data(joint, partition.num_fwd_outputs)
    backward = partition.backward.graph
    gradients, read = descendants(tangents(backward)), by_name(backward)
    readers = _readers(backward, gradients, _norm_inputs(joint))
    in_losses = _read_by_losses(backward, gradients)
    rotated = read_with_rotated_keys(joint, backward, gradients)
    saved = {n.name for storage in partition.saved_storages().values() for n in storage}

    def kept_as(node: fx.Node) -> Reason | None:
        if not value_of(node).dtype.is_floating_point:
            return INTEGER
        if storage_key(node) in data:
            return DATA
        if node.name in in_losses and readers[node.name] is not Reader.SOFTMAX:
            return LOSS
        if node.name in rotated:
            return ROTATED
        return STATISTIC if _is_statistic(node) else None

    def site(node: fx.Node) -> ValueSite:
        is_softmax = readers[node.name] is Reader.SOFTMAX
        probabilities = _probabilities(read[node.name], gradients) if is_softmax else None
        if probabilities is not None:
            return ValueSite(nodes[probabilities.name], Reader.SOFTMAX, shares=True)
        if (kept := kept_as(node)) is not None:
            return ValueSite(node, readers[node.name], kept)
        grows = amplification(read[node.name], gradients, _is_exponential_of_a_softmax)
        return ValueSite(node, readers[node.name], shares=is_softmax and _holds_shares(node), amplification=grows)

    found = (
        site(nodes[n.name])
        for n in partition.saved()
        if n.name in saved and n.name in nodes and value_of(n).dtype != torch.bool
    )
    return list(dict.fromkeys(found))


def _probabilities(saved: fx.Node, gradients: Set[fx.Node]) -> fx.Node | None:
    """The one exponential of a softmax by way of which alone the backward reads a saved tensor, if that is so."""

    def is_end(node: fx.Node) -> bool:
        return _is_exponential_of_a_softmax(node) or node in gradients or not is_local(node)

    reached = closure(list(saved.users), lambda node: () if is_end(node) else node.users)
    ends = [node for node in reached if is_end(node)]
    return ends[0] if len(ends) == 1 and _is_exponential_of_a_softmax(ends[0]) else None


def _holds_shares(node: fx.Node) -> bool:
    """Whether it is the result of a softmax, elsewhere, in another precision, or with zeros in place of some."""

    def sources(node: fx.Node) -> list[fx.Node]:
        if node.target is aten.where.self:
            _, *chosen = node.all_input_nodes
            return [n for n in chosen if constant_value(n) != 0]
        passes_on = node.target is prims.convert_element_type.default or node.target in COPIES or is_view(node)
        return node.all_input_nodes[:1] if passes_on else []

    return all(_is_result_of_a_softmax(n) for n in closure([node], sources) if not sources(n))


def _is_result_of_a_softmax(node: fx.Node) -> bool:
    return is_softmax(node) and _is_exponential_of_a_softmax(node.all_input_nodes[0])


def _packet(node: fx.Node) -> object:
    """The operation without the name of its overload."""
    return node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target


def _data(joint: fx.Graph, num_fwd_outputs: int) -> set[object]:
    """Storages of the inputs of the graph whose gradient is not asked for, or not known to be.

    As storages, for what is saved is often a view of one. A wrapper subclass that needs no gradient, such as a weight
    in 4 bits with its scales, is several inputs and one missing gradient. Which input a gradient belongs to is then
    not known.
    """
    incoming = set(tangents(joint))
    inputs = [n for n in placeholders(joint) if n not in incoming]
    gradients = output_values(joint)[num_fwd_outputs:]
    if len(gradients) != len(inputs):
        return {storage_key(n) for n in inputs}
    return {storage_key(n) for n, gradient in zip(inputs, gradients, strict=True) if gradient is None}


def _is_statistic(node: fx.Node) -> bool:
    """Whether the value follows, element by element, from a reduction of something much larger."""
    front, seen = [node], set()
    while front:
        current = front.pop()
        if current in seen or not isinstance(value_of(current), Tensor):
            continue
        seen.add(current)
        if current.target is operator.getitem or _packet(current) in _REDUCTIONS:
            reduced = current.args[0] if current.target is operator.getitem else current
            assert isinstance(reduced, fx.Node), "an operation on tensors"
            if _FEWER * _numel(node) <= max(map(_numel, reduced.all_input_nodes), default=0):
                return True
        elif is_local(current):
            front += current.all_input_nodes
    return False


def _numel(node: fx.Node) -> int:
    value = value_of(node)
    return hint(value.numel()) if isinstance(value, Tensor) else 0


def _norm_inputs(graph: fx.Graph) -> set[str]:
    """Names of what leads, element by element, to a reduction of which a root is taken: as in any normalisation."""
    has_root: dict[fx.Node, bool] = {}
    is_input: dict[fx.Node, bool] = {}
    for node in reversed(graph.nodes):
        has_root[node] = _packet(node) in _ROOTS or any(
            has_root[user] for user in node.users if is_pointwise(user) or user.target is operator.getitem
        )
        is_input[node] = any(
            (_packet(user) in _REDUCTIONS and _takes_a_root(user, has_root)) or (is_local(user) and is_input[user])
            for user in node.users
        )
    return {node.name for node, found in is_input.items() if found}


def _takes_a_root(reduction: fx.Node, has_root: Mapping[fx.Node, bool]) -> bool:
    return any(has_root[user] for user in reduction.users if is_pointwise(user) or user.target is operator.getitem)


def _readers(backward: fx.Graph, gradients: Set[fx.Node], norm_inputs: set[str]) -> dict[str, Reader]:
    """For each node's name the most sensitive reader of its values; recomputed values are followed to theirs."""
    found: dict[str, Reader] = {}
    for node in reversed(backward.nodes):
        readers = [_reading(user) for user in node.users if user in gradients or not is_local(user)]
        readers += [found[user.name] for user in node.users if user not in gradients and is_local(user)]
        readers += [Reader.SOFTMAX for user in node.users if _is_exponential_of_a_softmax(user)]
        readers += [Reader.NORM] if node.name in norm_inputs else []
        found[node.name] = max(readers, default=Reader.FACTOR)
    return found


def _read_by_losses(backward: fx.Graph, gradients: Set[fx.Node]) -> set[str]:
    """Names of what the derivative of a loss is computed from.

    Its gradient comes from fewer numbers, through nothing but pointwise operations. Residuals go to 0 in training,
    where the derivative of a loss may vary within less than the step between two codes.
    """
    spread: dict[fx.Node, int] = {}  # gradients of a loss, with the most elements that they are spread from
    found: set[str] = set()
    for node in backward.nodes:
        incoming = [n for n in node.all_input_nodes if n in gradients]
        if node in gradients and node.op == "placeholder":
            spread[node] = _numel(node)
        elif incoming and is_local(node) and all(n in spread for n in incoming):
            spread[node] = max(spread[n] for n in incoming)
    for node in reversed(backward.nodes):
        for user in node.users:
            is_loss = user in spread and spread[user] < _numel(user)
            if is_loss or (user not in gradients and user.name in found and is_local(user)):
                found.add(node.name)
    return found


def _reading(node: fx.Node) -> Reader:
    """What an operation reads its inputs for."""
    name = f"{getattr(node.meta.get('original_aten'), '__name__', '')} {node.target}"
    if "attention" in name or "softmax" in name:
        return Reader.SOFTMAX
    if "convolution" in name:
        return Reader.CONVOLUTION
    if "norm" in name:
        return Reader.NORM
    return Reader.LINEAR if _packet(node) in _PRODUCTS else Reader.FACTOR


def _is_exponential_of_a_softmax(node: fx.Node) -> bool:
    """exp(x - m), where m has one number for a whole row of x."""
    if node.target is not aten.exp.default:
        return False
    (argument,) = node.all_input_nodes
    if argument.target is not aten.sub.Tensor:
        return False
    return any(not same_shape(n, argument) for n in argument.all_input_nodes)
