"""The matrix: transforms of torch.func, users' operators, higher-order operators, compiled autograd, modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, held_bytes, mlp
from recording import EXACT, LEAN, Recording, check_all, error, run
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, linearize, stack_module_state, vmap

import fewbit_fx
from fewbit_fx.codec.dither import rounding_seed, uniform
from fewbit_fx.torch_private.inductor import partition_only


def gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    return grad(lambda a: model(a).square().mean())(x).square().sum() + model(x).mean()  # type: ignore[no-any-return]


def inner_step(model: nn.Module, x: Tensor) -> Tensor:
    weights = dict(model.named_parameters())
    slopes = grad(lambda w: functional_call(model, w, (x,)).square().mean())(weights)
    return functional_call(model, {n: w - 0.1 * slopes[n] for n, w in weights.items()}, (x,)).square().mean()  # type: ignore


def each_row(model: nn.Module, x: Tensor) -> Tensor:
    return vmap(lambda row: F.gelu(model(row)) * row.sum())(x).square().mean()  # type: ignore[no-any-return]


def tangent(model: nn.Module, x: Tensor) -> Tensor:
    value, slope = jvp(model, (x,), (torch.ones_like(x),))
    return value.square().mean() + slope.square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("transform", [gradient_penalty, inner_step, each_row, tangent])
def test_torch_func(transform: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, x = mlp(nn.GELU()), torch.randn(64, 32)
    check_all(lambda: transform(model, x), [*model.parameters()])


def test_torch_func_over_stacked_models() -> None:
    models, x = [mlp(nn.SiLU()) for _ in range(3)], torch.randn(64, 32)
    weights, buffers = stack_module_state(models)  # type: ignore[arg-type]

    def loss() -> Tensor:
        return vmap(lambda w, b: functional_call(models[0], (w, b), (x,)))(weights, buffers).square().mean()  # type: ignore

    check_all(loss, [*weights.values()])


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_torch_func_linearize() -> None:
    """Its trace has nodes of no known size, of which torch's algorithm cannot cut more."""
    model, x = mlp(nn.GELU()), torch.randn(64, 32)

    def loss() -> Tensor:
        value, push = linearize(model, x)
        return (value + push(x)).square().mean()  # type: ignore[no-any-return]

    expected = torch.autograd.grad(loss(), [*model.parameters()])
    recording, found = run(loss, [*model.parameters()], EXACT)
    assert error(found, expected) <= 1e-5
    assert recording.fewbit_bytes <= recording.plain_bytes


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.gelu(x) @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return (g @ w.t()) * x.sigmoid(), F.gelu(x).t() @ g


@torch.library.custom_op("fewbit_tests::product", mutates_args=())
def product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


@torch.library.custom_op("fewbit_tests::product_backward", mutates_args=())
def product_backward(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return g @ w.t(), x.t() @ g


@torch.library.custom_op("fewbit_tests::add_to", mutates_args=("sum",))
def add_to(x: Tensor, sum: Tensor) -> None:
    sum.add_(x)


product.register_fake(lambda x, w: x.new_empty(x.shape[0], w.shape[1]))
product_backward.register_fake(lambda g, x, w: (torch.empty_like(x), torch.empty_like(w)))
product.register_autograd(
    lambda ctx, g: product_backward(g, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize("operator", [Gated.apply, product])
def test_functions_and_operators_of_users(operator: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, w, x = mlp(nn.GELU()), nn.Parameter(torch.randn(16, 32) / 4), torch.randn(64, 32)
    check_all(lambda: model(operator(model(x), w)).square().mean(), [*model.parameters(), w])


def test_operators_that_change_their_inputs() -> None:
    """torch makes them functional, by way of an operator of higher order."""
    one, two, x = (torch.randn(64, 64, requires_grad=i < 2) for i in range(3))

    def loss() -> Tensor:
        h, total = F.gelu(x @ one / 8), torch.zeros(64, 64)
        add_to(h.detach(), total)
        return ((h * total.sigmoid()) @ two).square().mean()

    recording = check_all(loss, [one, two])
    computed = {str(n.target) for n in recording.graphs[0].works[0].chosen.backward.graph.nodes}
    assert "auto_functionalized_v2" not in computed  # what the operator does may differ each time


def with_cond(h: Tensor, w: Tensor) -> Tensor:
    return torch.cond(h.sum() > 0, lambda a, b: F.gelu(a @ b), lambda a, b: F.silu(a @ b) * a, (h, w))  # type: ignore


def with_map(h: Tensor, w: Tensor) -> Tensor:
    from functorch.experimental.control_flow import map as map_rows

    return map_rows(lambda a, b: F.gelu(a @ b) * a, h.view(8, 8, 32), w).view(64, 32)  # type: ignore[no-any-return]


def with_scan(h: Tensor, w: Tensor) -> Tensor:
    from torch._higher_order_ops.scan import scan

    last, rows = scan(lambda c, a: (torch.sin(c) + a, torch.sin(a) * 0.5 + c), h[:8] * 1, (h @ w).view(8, 8, 32), dim=0)
    return rows.reshape(64, 32) + last.sum()  # type: ignore[no-any-return]


def with_associative_scan(h: Tensor, w: Tensor) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    rows = torch.sigmoid(h @ w).view(4, 16, 32)
    return associative_scan(lambda a, b: a * b + b, rows, dim=0, combine_mode="generic").view(64, 32)  # type: ignore


@pytest.mark.parametrize("operator", [with_cond, with_map, with_scan, with_associative_scan])
def test_higher_order_operators(operator: Callable[[Tensor, Tensor], Tensor]) -> None:
    """They stay whole; what is around them is coded."""
    model, w, x = mlp(nn.GELU()), nn.Parameter(torch.randn(32, 32) / 6), torch.randn(64, 32)

    def loss() -> Tensor:
        return model(operator(F.silu(x @ w), w)).square().mean()  # type: ignore[no-any-return]

    check_all(loss, [*model.parameters(), w])


class Block(nn.Module):
    """One layer whose weights take more than its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(32, 64), nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))


@pytest.mark.parametrize("trained", [True, False])
def test_nested_compile_region(trained: bool) -> None:
    """A region is partitioned by itself, once, and knows of no input whether it lives anyway: all are left exact.

    What lives on is what the graph around it says that it saves, each call by itself.
    """
    model, x = Block(), torch.randn(8, 32)
    model.layer.requires_grad_(trained)
    wanted = [p for p in model.parameters() if p.requires_grad]

    @torch.compiler.nested_compile_region
    def region(h: Tensor) -> Tensor:
        return model.layer(h)  # type: ignore[no-any-return]

    def loss() -> Tensor:
        return region(region(model.first(x))).square().mean()

    def held(backend: Any) -> int:
        torch.compiler.reset()
        return held_bytes(torch.compile(loss, backend=backend, dynamic=False)(), model)

    without = held(lambda gm, inputs: partition_only(gm, inputs, None))  # type: ignore[arg-type]
    recording = check_all(loss, wanted)
    region_record, around = recording.graphs[0].records
    assert 0 < region_record.fewbit_bytes < region_record.plain_bytes / 2
    assert held(Recording(LEAN).backend) == around.fewbit_bytes < without


def test_flex_attention_on_a_cpu_is_refused_by_torch_itself() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    linear, x = nn.Linear(32, 96), torch.randn(1, 128, 32)

    def attend() -> Tensor:
        q, k, v = linear(x).view(1, 128, 2, 3, 16).permute(3, 0, 2, 1, 4)
        return flex_attention(q, k, v).square().mean()  # type: ignore[union-attr]

    messages = []
    for backend in ("inductor", "fewbit"):
        torch.compiler.reset()
        with pytest.raises(Exception, match="does not support backward on CPU") as raised:
            torch.compile(attend, backend=backend)()
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_compiled_autograd() -> None:
    """The forward's backend is fewbit's, and so is the compiler of the backward, which sees codes as its inputs."""
    model, x = mlp(nn.GELU()), torch.randn(64, 32)
    apart, expected = run(lambda: model(x).square().mean(), [*model.parameters()], LEAN)
    with torch._dynamo.config.patch(compiled_autograd=True):
        together, found = run(lambda: model(x).square().mean(), [*model.parameters()], LEAN)
    assert apart.check() == 1
    assert together.fewbit_bytes == apart.fewbit_bytes < apart.plain_bytes
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes(mode: str) -> None:
    """A product may sum in another order, so that codes would differ: the mask of a ReLU is exact."""
    model, x = mlp(nn.ReLU(), frozen=True), torch.randn(128, 32)
    backend = fewbit_fx.backend(recipe="exact", min_numel=0, strict=True, mode=mode)
    found = gradients(model, torch.compile(model, backend=backend)(x).square().mean())
    assert error(found, gradients(model, model(x).square().mean())) <= 1e-5
    assert backend.last_report().fewbit_bytes < backend.last_report().plain_bytes


def test_under_a_cuda_graph_seeds_follow_the_data() -> None:
    """A replay repeats the seed of the capture, and so must differ by the data; no tag keeps a graph from capture."""
    seed = rounding_seed(torch.device("cpu"))
    one, two = torch.randn(4, 256), torch.randn(4, 256)
    assert not torch.equal(uniform(seed, one, one), uniform(seed, two, two))
    assert torch.Tag.cudagraph_unsafe not in torch.ops.fewbit_fx.rounding_seed.default.tags
