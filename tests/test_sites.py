"""Sites are found from the shape of the graph: hand-built graphs, and traced ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import STRICT, derivative, mlp, watch
from torch import Tensor, fx, nn

from fewbit_fx.passes.graph import aten, prims
from fewbit_fx.passes.sites import DerivativeSite, MaskSite, find_sites


class Builder:
    """Builds a joint graph by hand: x is a forward tensor, g the gradient that comes in."""

    def __init__(self, shape: tuple[int, ...] = (4, 8)) -> None:
        self.graph = fx.Graph()
        self.x = self.input("primals_1", torch.empty(shape))
        self.g = self.input("tangents_1", torch.empty(shape))

    def input(self, name: str, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def call(self, target, *args) -> fx.Node:  # type: ignore[no-untyped-def]
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def sites(self, *outputs: fx.Node) -> list[DerivativeSite | MaskSite]:
        self.graph.output(tuple(outputs))
        return find_sites(self.graph, {n.name for n in self.graph.nodes})[0]


def tanh_backward(b: Builder, x: fx.Node, g: fx.Node) -> tuple[fx.Node, fx.Node]:
    y = b.call(aten.tanh.default, x)
    slope = b.call(aten.sub.Tensor, b.call(aten.full.default, [], 1.0), b.call(aten.mul.Tensor, y, y))
    return y, b.call(aten.mul.Tensor, g, slope)


def test_one_multiplication() -> None:
    b = Builder()
    y, gx = tanh_backward(b, b.x, b.g)
    (site,) = b.sites(y, gx)
    assert isinstance(site, DerivativeSite)
    assert (site.entry, site.exit, site.source) == (b.g, gx, b.x)
    x = torch.linspace(-3, 3, 33, dtype=torch.float64)
    torch.testing.assert_close(torch.from_numpy(site.derivative.ideal(x.numpy()).copy()), derivative(torch.tanh, x))


def test_product_of_factors_and_sum_of_branches_contract_to_one_region() -> None:
    b = Builder()
    s = b.call(aten.sigmoid.default, b.x)
    left = b.call(aten.mul.Tensor, b.g, s)
    right = b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, b.g, b.x), b.call(aten.cos.default, b.x))
    gx = b.call(aten.neg.default, b.call(aten.div.Tensor, b.call(aten.add.Tensor, left, right), 2.0))
    (site,) = b.sites(s, gx)
    assert (site.entry, site.exit, site.source) == (b.g, gx, b.x)
    x = torch.linspace(-3, 3, 33, dtype=torch.float64)
    expected = -(torch.sigmoid(x) + x * torch.cos(x)) / 2
    torch.testing.assert_close(torch.from_numpy(site.derivative.ideal(x.numpy()).copy()), expected)


def test_factors_of_two_tensors_are_two_sites() -> None:
    b = Builder()
    other = b.input("primals_2", torch.empty(4, 8))
    _, first = tanh_backward(b, other, b.g)
    y, second = tanh_backward(b, b.x, first)
    one, two = b.sites(y, second)
    assert (one.entry, one.exit, one.source) == (b.g, first, other)
    assert (two.entry, two.exit, two.source) == (first, second, b.x)


def test_several_readers_of_the_exit_and_of_the_middle() -> None:
    b = Builder()
    halved = b.call(aten.mul.Tensor, b.g, 0.5)
    y, gx = tanh_backward(b, b.x, halved)
    (site,) = b.sites(y, gx, b.call(aten.exp.default, gx), halved)
    assert site.entry is b.g
    assert site.exit is gx


def test_a_shared_gradient_is_the_exit_not_its_conversions() -> None:
    b = Builder()
    y, gx = tanh_backward(b, b.x, b.g)
    converted = b.call(aten.neg.default, b.call(prims.convert_element_type.default, gx, torch.bfloat16))
    (site,) = b.sites(y, converted, b.call(aten.sum.default, gx))
    assert isinstance(site, DerivativeSite)
    assert (site.entry, site.exit) == (b.g, gx)


def test_a_factor_of_another_shape_is_no_site() -> None:
    b = Builder()
    row = b.input("primals_2", torch.empty(8))
    assert b.sites(b.x, b.call(aten.mul.Tensor, b.g, b.call(aten.tanh.default, row))) == []


def test_what_is_not_linear_in_the_gradient_is_no_site() -> None:
    b = Builder()
    slope = b.call(aten.tanh.default, b.x)
    squared = b.call(aten.mul.Tensor, b.g, b.g)
    shifted = b.call(aten.add.Tensor, b.g, slope)
    flipped = b.call(aten.div.Tensor, slope, b.g)
    assert b.sites(slope, squared, shifted, flipped) == []


def test_nodes_without_metadata_are_left_alone() -> None:
    b = Builder()
    y, gx = tanh_backward(b, b.x, b.g)
    for node in (b.x, b.g, gx):
        del node.meta["val"]
    assert b.sites(y, gx) == []


def test_a_boolean_decides_the_whole_factor() -> None:
    b = Builder()
    mask = b.call(aten.gt.Scalar, b.x, 0.0)
    gx = b.call(aten.where.self, mask, b.g, b.call(aten.full.default, [], 0.0))
    (site,) = b.sites(b.x, gx)
    assert isinstance(site, MaskSite)
    assert site.node is mask


def test_where_with_other_than_zero_is_not_linear() -> None:
    b = Builder()
    mask = b.call(aten.gt.Scalar, b.x, 0.0)
    gx = b.call(aten.where.self, mask, b.g, b.call(aten.full.default, [], 1.0))
    assert [type(s) for s in b.sites(b.x, gx)] == [MaskSite]


def kinds(function, *args) -> list[tuple[str, str]]:  # type: ignore[no-untyped-def]
    return [(type(s).__name__, r.function) for s, r in _with_records(watch(function, *args, config=STRICT))]


def _with_records(seen):  # type: ignore[no-untyped-def]
    return zip(seen.sites, seen.record.sites, strict=True)


def test_traced_activations_are_one_site_each() -> None:
    x = torch.randn(32, 32)
    for name, module in {
        "gelu": nn.GELU(),
        "silu": nn.SiLU(),
        "mish": nn.Mish(),
        "elu or celu": nn.ELU(),
        "softplus": nn.Softplus(),
        "gelu (tanh)": nn.GELU("tanh"),
        "hardswish": nn.Hardswish(),
        "sigmoid": nn.Sigmoid(),
    }.items():
        assert kinds(mlp(module), x) == [("DerivativeSite", name)], name


def test_traced_piecewise_linear_activations_are_masks() -> None:
    x = torch.randn(32, 32)
    for name, module in {
        "relu": nn.ReLU(),
        "leaky relu": nn.LeakyReLU(),
        "hardtanh": nn.Hardtanh(),
        "relu6": nn.ReLU6(),
    }.items():
        assert kinds(mlp(module), x) == [("MaskSite", name)], name


def test_traced_in_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert kinds(mlp(nn.GELU()).to(dtype), torch.randn(32, 32, dtype=dtype)) == [("DerivativeSite", "gelu")]


def test_traced_user_written_functions() -> None:
    def quick_gelu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)

    def soft_cap(x: Tensor) -> Tensor:
        return 30 * torch.tanh(x / 30)

    class Lambda(nn.Module):
        def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    x = torch.randn(32, 32)
    assert kinds(mlp(Lambda(quick_gelu)), x) == [("DerivativeSite", "quick gelu")]
    assert kinds(mlp(Lambda(soft_cap)), x) == [("DerivativeSite", "custom")]


def test_traced_dropout_after_gelu_is_two_sites() -> None:
    model = mlp(nn.Sequential(nn.GELU(), nn.Dropout(0.3)))
    assert sorted(kinds(model, torch.randn(32, 32))) == [("DerivativeSite", "gelu"), ("MaskSite", "dropout")]


def test_a_gate_is_a_product() -> None:
    def gated(x: Tensor, gate: Tensor) -> Tensor:
        return F.silu(gate) * x

    found = kinds(gated, *(torch.randn(32, 32, requires_grad=True) for _ in range(2)))
    assert ("DerivativeSite", "silu") in found
