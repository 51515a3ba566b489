"""Find what could be coded in a joint graph, from its shape alone, with no list of activations.

A derivative site is a region of pointwise operations of the backward with one way in and one out:

    entry g  ->  [ * , / , neg, convert, where, + of branches ]  ->  exit g' = g * d(x)
                      ^ factors, all pointwise functions of one forward tensor x

Gradients and factors are real numbers, and so is every node of a region; the product with anything else is
none. A conversion that rounds a gradient on purpose, as a float8 recipe or ``x.to(bfloat16)`` does, is never
inside of a region, where it would be lost: it may only be its end.

A mask site is a boolean tensor of the forward that the backward reads other than to make a mask.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fewbit_fx.torch_private.sizes import statically_known_true

from ..derivative import Derivative, NotEvaluableError
from ..graph import (
    COPIES,
    aten,
    closure,
    constant_value,
    descendants,
    is_boolean,
    is_local,
    is_pointwise,
    prims,
    same_shape,
    tangents,
    value_of,
)
from .derivative_site import DerivativeSite, Origin
from .mask_site import MaskSite
from .site import Site, Unreadable

_UNARY_LINEAR = frozenset({aten.neg.default, prims.convert_element_type.default}) | COPIES
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_CONVERSIONS = frozenset(
    map(str, (prims.convert_element_type.default, aten._to_copy.default))
)  # copies compare by name


def find_sites(graph: fx.Graph, computed: Collection[str]) -> tuple[list[Site], list[Unreadable]]:
    """All sites of a joint graph, in the order of its nodes, and the regions that could not be read.

    Args:
        graph: Joint forward+backward graph after decomposition.
        computed: Names of the nodes that the backward computes, recomputed ones included.
    """
    backward = descendants(tangents(graph))
    regions, unreadable = _find_regions(graph, backward)
    sites: list[Site] = []
    deciding: dict[fx.Node, Derivative | None] = {}
    for region, derivative in regions.items():
        if region.mask is not None:
            deciding.setdefault(region.mask, derivative)
        else:
            assert region.source is not None, "a region has sources, and what is not boolean is a real number"
            assert derivative is not None, "what has a source has a derivative"
            sites.append(
                DerivativeSite(
                    region.entry,
                    region.exit,
                    region.source,
                    region.sources,
                    region.factors,
                    derivative,
                    _is_gate(region, backward),
                    _origin(region.entry, backward),
                )
            )
    inside = {n for region in regions if region.mask is None for n in region.program()}
    sites += [MaskSite(m, deciding.get(m)) for m in _find_masks(graph, backward, inside, computed)]
    return sorted(sites, key=lambda site: site.anchor), unreadable


@dataclass(frozen=True)
class _Region:
    """Operations from entry to exit, linear in the entry, and where their factors come from.

    ``sources`` are the boolean and real nodes that each by itself determines all the factors, the nearest first.
    """

    entry: fx.Node
    exit: fx.Node
    nodes: frozenset[fx.Node]
    factors: tuple[fx.Node, ...]
    sources: tuple[fx.Node, ...]

    @property
    def mask(self) -> fx.Node | None:
        """The nearest boolean tensor that alone decides the factor."""
        return next((s for s in self.sources if value_of(s).dtype == torch.bool), None)

    @property
    def source(self) -> fx.Node | None:
        """The farthest floating point tensor from which the factor follows."""
        floats = [s for s in self.sources if _is_real(s)]
        return floats[-1] if floats else None

    def program(self) -> set[fx.Node]:
        """The nodes that lead from the source and the entry to the exit."""
        nodes = set(self.nodes)
        todo = list(self.factors) + [n for m in self.nodes for n in m.all_input_nodes if _is_constant(n)]
        while todo:
            node = todo.pop()
            if node is not self.source and node not in nodes:
                nodes.add(node)
                todo.extend(node.all_input_nodes)
        return nodes

    def derivative(self) -> Derivative | None:
        """The factor as a function of the source, if there is one. Raises NotEvaluableError."""
        if self.source is None:
            return None
        return Derivative.of_region(self.source, self.entry, sorted(self.program()))


def _is_constant(node: fx.Node) -> bool:
    return constant_value(node) is not None


def _find_regions(graph: fx.Graph, backward: set[fx.Node]) -> tuple[dict[_Region, Derivative | None], list[Unreadable]]:
    regions: dict[_Region, Derivative | None] = {}
    unreadable: list[Unreadable] = []
    covered: set[fx.Node] = set()
    for exit_node in reversed(graph.nodes):
        if exit_node not in backward or exit_node in covered or _passes_on_a_shared_gradient(exit_node, backward):
            continue
        region = _grow(exit_node, backward)
        if region is None:
            continue
        covered |= region.nodes
        try:
            regions[region] = region.derivative()
        except NotEvaluableError as error:
            unreadable.append(Unreadable(exit_node, error.reason, region.factors))
    return regions, unreadable


def _passes_on_a_shared_gradient(node: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether a node only converts or scales a gradient that others read too: then that gradient is the exit.

    A bias in float32 before a bfloat16 matrix product under autocast reads it so. To replace just
    the converted one would leave the exact derivative to the bias.
    """
    while True:
        gradients = linear_inputs(node, backward)
        if gradients is None or len(gradients) != 1 or _factors(node, backward):
            return False
        (node,) = gradients
        if len(node.users) > 1:
            return True


def _factors(node: fx.Node, backward: set[fx.Node]) -> set[fx.Node]:
    """Tensors of the forward that a node of the backward reads."""
    return {n for n in node.all_input_nodes if n not in backward and not _is_constant(n)}


def _grow(exit_node: fx.Node, backward: set[fx.Node]) -> _Region | None:
    """The largest region that ends in ``exit_node`` and whose factors have a single source."""
    best = None
    nodes: set[fx.Node] = set()
    factors: set[fx.Node] = set()
    open_ends = {exit_node}
    while True:
        latest = max(open_ends)
        gradients = linear_inputs(latest, backward)
        if gradients is None or not all(same_shape(g, exit_node) for g in gradients):
            return best
        new_factors = _factors(latest, backward)
        if not all(same_shape(f, exit_node) for f in new_factors):
            return best
        if _rounds_on_purpose(latest) and _is_widened_after(latest, nodes):
            return best
        nodes.add(latest)
        factors |= new_factors
        open_ends = (open_ends - {latest}) | set(gradients)
        if new_factors and not any(True for _ in _single_sources(factors)):
            return best
        if factors and len(open_ends) == 1:
            (entry,) = open_ends
            sources = tuple(_single_sources(factors))
            in_order = tuple(sorted(factors))
            best = _Region(entry, exit_node, frozenset(nodes), in_order, sources)


def _rounds_on_purpose(node: fx.Node) -> bool:
    """Whether a node is a conversion to a narrower dtype that the model asks for.

    A decomposition rounds, too, where it returns to the dtype of its operation; the name of that is kept.
    """
    if node.target is not prims.convert_element_type.default:
        return False
    given, made = value_of(node.all_input_nodes[0]).dtype, value_of(node).dtype
    is_exact = given == made or given.itemsize < made.itemsize
    return not is_exact and str(node.meta.get("original_aten", node.target)) in _CONVERSIONS


def _is_widened_after(node: fx.Node, region: set[fx.Node]) -> bool:
    """Whether a region turns the value of a node into another dtype."""
    behind = closure([node], lambda n: [user for user in n.users if user in region])
    return any(value_of(n).dtype != value_of(node).dtype for n in behind)


def linear_inputs(node: fx.Node, backward: set[fx.Node]) -> list[fx.Node] | None:
    """The gradients in which a pointwise node of real numbers is linear, or None if it is not linear in them."""
    if node.op != "call_function" or node not in backward or not _is_real(node):
        return None
    gradients = [a for a in node.args if isinstance(a, fx.Node) and a in backward]
    if not all(map(_is_real, gradients)):
        return None
    others = [a for a in node.args if not (isinstance(a, fx.Node) and a in backward)]
    if any(isinstance(a, fx.Node) and not isinstance(value_of(a), Tensor) for a in others):
        return None
    if node.target in _UNARY_LINEAR:
        return gradients
    if node.target is aten.mul.Tensor:
        return gradients if len(gradients) == 1 else None
    if node.target is aten.div.Tensor:
        return gradients if len(gradients) == 1 and node.args[0] is gradients[0] else None
    if node.target in _SUMS:
        return gradients if len(gradients) == 2 and not node.kwargs else None
    if node.target is aten.where.self and node.args[0] not in backward:
        zeros = all(isinstance(a, fx.Node) and constant_value(a) == 0 for a in others[1:])
        return gradients if zeros else None
    return None


def _single_sources(factors: set[fx.Node]) -> Iterator[fx.Node]:
    """Boolean and real nodes that alone determine all the factors, the nearest first."""
    front = set(factors)
    shape = next(iter(factors))
    while front:
        if any(value_of(n).dtype.is_complex for n in front):
            return
        if len(front) == 1:
            (node,) = front
            if is_boolean(node) or _is_real(node):
                yield node
        latest = max(front)
        if not is_pointwise(latest):
            return
        inputs = {n for n in latest.all_input_nodes if not _is_constant(n)}
        if not all(same_shape(n, shape) for n in inputs):
            return
        front = (front - {latest}) | inputs


def _is_gate(region: _Region, backward: set[fx.Node]) -> bool:
    """Whether the one factor multiplies, in the forward, a tensor that does not follow from the source."""
    source = region.source
    if source is None or len(region.factors) != 1:
        return False
    todo = list(region.factors)
    while todo:
        value = todo.pop()
        for user in value.users:
            if user in backward or user.op != "call_function":
                continue
            if user.target in _UNARY_LINEAR:
                todo.append(user)
            elif user.target is aten.mul.Tensor and any(
                n is not value and not _is_constant(n) and source not in _single_sources({n})
                for n in user.all_input_nodes
            ):
                return True
    return False


def _origin(entry: fx.Node, backward: set[fx.Node]) -> Origin:
    """Find where a gradient comes from. What is not pointwise, and does more than move elements, counts as a layer."""
    reached = closure([entry], lambda n: [i for i in n.all_input_nodes if i in backward])
    if not all(n.op == "placeholder" or is_local(n) for n in reached):
        return Origin.LAYER
    sizes = [value_of(n).numel() for n in reached if n.op == "placeholder"]
    fewer = all(statically_known_true(size < value_of(entry).numel()) for size in sizes)
    return Origin.BROADCAST if fewer else Origin.OUTSIDE


def _find_masks(
    graph: fx.Graph, backward: set[fx.Node], in_derivatives: set[fx.Node], computed: Collection[str]
) -> list[fx.Node]:
    """Masks, but not those of masks, nor those read only within derivative sites: they follow from their x."""

    def reads(user: fx.Node) -> bool:
        return user.name in computed and user not in in_derivatives and not is_boolean(user)

    return [
        node
        for node in graph.nodes
        if is_boolean(node)
        and not _is_constant(node)
        and node.op != "placeholder"
        and node not in backward
        and any(map(reads, node.users))
    ]


def _is_real(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dtype.is_floating_point
