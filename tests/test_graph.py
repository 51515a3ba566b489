"""Small questions to a graph, on graphs built by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fewbit_fx.passes.graph import (
    ancestors,
    aten,
    by_name,
    closure,
    constant_value,
    descendants,
    is_pointwise,
    output_values,
    placeholders,
    prims,
    same_shape,
    tangents,
    value_of,
)


def input_of(value: Any, name: str = "x") -> fx.Node:
    node = fx.Graph().placeholder(name)
    node.meta["val"] = value
    return node


def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    return fx.Graph().call_function(target, args, kwargs)


@pytest.mark.parametrize("value", [0, 1.5, True, -2])
@pytest.mark.parametrize(
    ("target", "args"),
    [(aten.full.default, ([2, 3],)), (aten.full_like.default, ("x",)), (aten.scalar_tensor.default, ())],
)
def test_the_number_that_fills_a_tensor(target: Callable[..., Any], args: tuple[Any, ...], value: float) -> None:
    found = constant_value(call(target, *args, value))
    assert found == value
    assert type(found) is type(value)


def test_no_number_fills_a_tensor() -> None:
    x = fx.Graph().placeholder("x")
    filled_by_a_node = x.graph.call_function(aten.full.default, ([2], x))
    for node in (
        x,
        filled_by_a_node,
        call(aten.zeros.default, [2]),
        call(aten.add.Tensor, 1, 1),
        call(torch.full, [2], 1),
    ):
        assert constant_value(node) is None


@pytest.mark.parametrize(
    "target",
    [
        aten.mul.Tensor,
        aten.where.self,
        aten.gt.Scalar,
        prims.convert_element_type.default,
        aten.clone.default,
        aten.alias.default,
    ],
    ids=str,
)
def test_pointwise_operations(target: Callable[..., Any]) -> None:
    assert is_pointwise(call(target))


@pytest.mark.parametrize(
    "target",
    [
        aten.sum.default,
        aten.mm.default,
        aten.view.default,
        aten.rrelu.default,
        prims.inductor_random.default,
        torch.mul,
    ],
    ids=lambda target: getattr(target, "_name", target.__name__),
)
def test_what_is_not_pointwise(target: Callable[..., Any]) -> None:
    """Reductions, views, chance (rrelu is tagged pointwise, too), and functions that are no operators."""
    assert not is_pointwise(call(target))
    assert not is_pointwise(fx.Graph().placeholder("x"))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (torch.empty(2, 3), torch.empty(2, 3, dtype=torch.bool), True),
        (torch.empty(()), torch.empty(()), True),
        (torch.empty(2, 3), torch.empty(3, 2), False),
        (torch.empty(2, 3), torch.empty(1, 3), False),
        (torch.empty(2, 3), torch.empty(1, 2, 3), False),
        (torch.empty(2), torch.empty(2, 3), False),
        (torch.empty(2), 2, False),
        (torch.empty(2), None, False),
    ],
    ids=lambda value: f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else None,
)
def test_the_same_shape(one: Any, other: Any, expected: bool) -> None:
    assert same_shape(input_of(one), input_of(other)) is expected
    assert same_shape(input_of(other), input_of(one)) is expected


def test_symbolic_shapes_are_compared_without_a_new_guard() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), y.sin()

    graph = make_fx(function, tracing_mode="symbolic")(torch.empty(6, 4), torch.empty(5, 4)).graph
    x, y = placeholders(graph)
    sine, other_sine = output_values(graph)
    guards = len(value_of(x).fake_mode.shape_env.guards)
    assert same_shape(x, sine)
    assert not same_shape(x, y)
    assert not same_shape(sine, other_sine)
    assert len(value_of(x).fake_mode.shape_env.guards) == guards


def test_tangents_are_the_placeholders_that_aotautograd_names_so() -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("primals_1", "tangents_1", "tangents_of", "mul")]
    other = graph.create_node("get_attr", "tangents_3")
    graph.output((other,))
    assert tangents(graph) == nodes[1:3]
    assert placeholders(graph) == nodes


def diamond() -> dict[str, fx.Node]:
    """x to left and right, both to end; y beside them, read by right."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    left = graph.call_function(aten.neg.default, (x,), name="left")
    right = graph.call_function(aten.mul.Tensor, (x, y), name="right")
    end = graph.call_function(aten.add.Tensor, (left, right), name="end")
    graph.output((end, None, left))
    return by_name(graph)


def names(nodes: set[fx.Node]) -> set[str]:
    return {n.name for n in nodes}


def test_ancestors_and_descendants_include_the_roots() -> None:
    nodes = diamond()
    assert names(ancestors([nodes["end"]])) == {"x", "y", "left", "right", "end"}
    assert names(ancestors([nodes["left"]])) == {"x", "left"}
    assert names(descendants([nodes["y"]])) == {"y", "right", "end", "output"}
    assert names(descendants([nodes["left"], nodes["right"]])) == {"left", "right", "end", "output"}
    assert ancestors([]) == descendants([]) == set()


def test_outputs_are_flat_and_keep_what_is_no_node() -> None:
    nodes = diamond()
    assert output_values(nodes["x"].graph) == [nodes["end"], None, nodes["left"]]


def test_a_closure_goes_where_its_step_goes_and_no_farther() -> None:
    nodes = diamond()
    found = closure([nodes["end"]], lambda n: [i for i in n.all_input_nodes if i.name != "right"])
    assert names(found) == {"end", "left", "x"}


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=20), st.sets(st.integers(0, 7)))
def test_a_closure_is_the_smallest_set_that_its_step_stays_in(edges: list[tuple[int, int]], roots: set[int]) -> None:
    """Of any steps, in circles too: against repetition until nothing changes."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(8)]
    expected, before = set(roots), None
    while expected != before:
        before = set(expected)
        expected |= {b for a, b in edges if a in expected}
    found = closure([nodes[i] for i in roots], lambda n: [nodes[b] for a, b in edges if nodes[a] is n])
    assert found == {nodes[i] for i in expected}
