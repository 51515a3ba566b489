"""Training as users write it: breaks, several backwards, accumulation, modes, freezing, overflow, copies, threads."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import mlp
from scenarios import CONFIGS, LEAN, Compile, compare, run
from test_matrix_shapes import FROZEN, Net, gradients
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fewbit_fx
from fewbit_fx import FewBitConfig
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.torch_private.inductor import GraphRun, partition_only
from fewbit_fx.torch_private.inputs import kept_by_their_makers

Scenario = Callable[[Compile], Any]


def x_of(seed: int = 0, rows: int = 48) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


# Line 5: graph breaks.


class Breaking(Net):
    """A break between x and f(x) within a call, and one between a gate and what it multiplies."""

    def _gate(self, h: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return F.silu(F.gelu(h) @ FROZEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        gate = self._gate(h)
        torch._dynamo.graph_break()
        return self.b(gate * torch.tanh(h))


@pytest.mark.slow
def test_graph_breaks_before_an_activation_within_a_call_and_before_a_product() -> None:
    def scenario(compile: Compile) -> Any:
        model, x = Breaking(), x_of().requires_grad_()
        y = compile(model)(x)
        return [y], gradients(model, y, x)

    assert len(compare(scenario)["lean"].records) == 3


# Line 6: several backwards.


def test_two_backwards_and_gradients_of_a_part_of_the_inputs() -> None:
    def scenario(compile: Compile) -> Any:
        model, x = Net(), x_of().requires_grad_()
        y = compile(model)(x)
        found = []
        for wanted in ([x], [model.a.weight], list(model.parameters()), [x, model.b.bias]):
            found += torch.autograd.grad(y.square().sum(), wanted, retain_graph=True)
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        return [y], [*found, x.grad, *(p.grad for p in model.parameters())]

    compare(scenario)


def test_a_second_derivative_is_the_error_that_it_is_with_inductor() -> None:
    def scenario(compile: Compile) -> Any:
        model, x = Net(), x_of().requires_grad_()
        (first,) = torch.autograd.grad(compile(model)(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
        return [], []

    for config in (None, LEAN):
        assert "double backward" in str(run(scenario, config).error)


# Line 7: accumulation.


def test_two_forwards_before_two_backwards_in_either_order() -> None:
    def scenario(compile: Compile) -> Any:
        model = Net()
        compiled = compile(model)
        losses = [compiled(x_of(seed)).square().sum() for seed in (1, 2)]
        for loss in reversed(losses):
            loss.backward()
        compiled(x_of(3)).square().sum().backward()
        return losses, [p.grad for p in model.parameters()]

    compare(scenario, tuple(CONFIGS))


# Line 8: modes.


def test_nothing_is_coded_without_gradients_and_training_goes_on_behind_it() -> None:
    def scenario(compile: Compile) -> Any:
        model = nn.Sequential(Net(), nn.Dropout(0.2), nn.BatchNorm1d(32))
        compiled = compile(model)
        outputs, found = [], []
        for training in (True, False, True):
            model.train(training)
            y = compiled(x_of())
            outputs.append(y)
            found += gradients(model, y)
        model.eval()
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                outputs.append(compiled(x_of()))
        return outputs, found

    assert len(compare(scenario)["lean"].records) == 2, "training and evaluation with gradients"


# Line 9: freezing.


@pytest.mark.slow
def test_a_frozen_layer_is_compiled_anew_and_what_only_it_read_is_coded_otherwise() -> None:
    def scenario(compile: Compile) -> Any:
        model = mlp(nn.GELU())
        compiled = compile(model)
        outputs, found = [], []
        for trained in (True, False, True):
            model[2].requires_grad_(trained)
            y = compiled(x_of())
            outputs.append(y)
            found += torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])
        return outputs, found

    counter = CompileCounterWithBackend("aot_eager")
    scenario(lambda function: torch.compile(function, backend=counter))
    anew = counter.frame_count > 1  # torch 2.11 goes on with the graph that trains all
    found = compare(scenario, tuple(CONFIGS))
    for name, config in CONFIGS.items():
        coded = [[(s.function, s.form, s.bits) for s in r.sites if not s.is_exact] for r in found[name].records]
        assert coded == [[("factor", "values", config.value_bits)], *[[("gelu", "codes", config.bits)]] * anew]


# Line 10: overflow.

RECIPES = [
    (recipe, rounding)
    for recipe in ("exact", "derivatives", "default", "lean")
    for rounding in ("nearest", "stochastic")
    if (recipe, rounding) != ("exact", "stochastic")
]
BAD = float("inf"), float("nan"), float("-inf")


class Overflowing(nn.Module):
    """Layers of each kind that is coded, and a factor in the middle that may be too large."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 32)
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        h = F.gelu(self.a(x)) @ FROZEN.to(x.dtype)
        h = self.norm(self.b(F.silu(h) * h) * factor * 64)
        return self.c(F.softmax(h, -1) * F.relu(h))


def _gradients_after_overflow(compiled: Callable[..., Any], model: Overflowing, dtype: torch.dtype) -> list[list[bool]]:
    """Whether the loss and each parameter's gradient are finite, for each place of a bad number."""
    found = []
    places = [(where, value) for where in ("x", "weight", "gradient") for value in BAD] + [("middle", 0.0), ("none", 0)]
    for where, value in places:
        x, factor, good = x_of().to(dtype), torch.ones(48, 1, dtype=dtype), copy.deepcopy(model.state_dict())
        if where == "x":
            x[3, 5] = value
        if where == "weight":
            with torch.no_grad():
                model.b.weight[7, 9] = value
        if where == "middle":
            factor[11] = torch.finfo(dtype).max
        y = compiled(x, factor)
        incoming = torch.ones_like(y)
        if where == "gradient":
            incoming[2, 2] = value
        gradients = torch.autograd.grad(y, list(model.parameters()), incoming)
        found.append([bool(t.isfinite().all()) for t in (y, *gradients)])
        model.load_state_dict(good)
    return found


@pytest.mark.slow
def test_gradients_are_finite_where_those_of_inductor_are() -> None:
    """So GradScaler skips the same steps."""
    dtype = torch.float16

    def run_with(config: FewBitConfig | None) -> list[list[bool]]:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Overflowing().to(dtype)
        records: list[Any] = []

        def backend(gm: Any, inputs: Any) -> Any:
            return partition_only(gm, inputs, config and FewBitPartitioner(config, records.append))

        found = _gradients_after_overflow(torch.compile(model, backend=backend, dynamic=False), model, dtype)
        assert config is None or any(not s.is_exact for r in records for s in r.sites) or config.recipe == "exact"
        return found

    expected = run_with(None)
    assert all(expected[-1]), "without a bad number all is finite"
    assert all(not all(finite) for finite in expected[:-1]), "each bad number is seen"
    for recipe, rounding in RECIPES:
        config = FewBitConfig(recipe=recipe, rounding=rounding, min_numel=0, strict=True, max_relative_error=10.0)
        assert run_with(config) == expected, (recipe, rounding)


def test_grad_scaler_skips_the_same_steps_under_autocast() -> None:
    def scenario(compile: Compile) -> Any:
        model = Net()
        compiled = compile(model, dynamic=False)
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**16)
        scales = []
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = (compiled(x_of(step)).float() * (1e6 if step == 1 else 1)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(torch.tensor(scaler.get_scale()))
        return scales, [p.grad for p in model.parameters()]

    found = compare(scenario)
    scales = [float(t) for t in found["lean"].outputs]
    assert scales[1] < scales[0]
    assert scales[2] == scales[3]


# Line 12: copies, names and threads.


def test_copies_pickles_and_state_of_a_compiled_model() -> None:
    config = pickle.loads(pickle.dumps(LEAN))
    assert config == copy.deepcopy(LEAN) == LEAN
    backend = fewbit_fx.backend(recipe="lean", bits=2)
    for other in (pickle.loads(pickle.dumps(backend)), copy.deepcopy(backend)):
        assert repr(other) == repr(backend)
    model = Net()
    model.compile(backend=pickle.loads(pickle.dumps(backend)))
    loaded = pickle.loads(pickle.dumps(model))
    assert list(torch.compile(model, backend=backend).state_dict()) == [f"_orig_mod.{n}" for n in model.state_dict()]
    assert all(torch.equal(v, loaded.state_dict()[n]) for n, v in model.state_dict().items())


class Rectified(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.b(F.relu(self.a(x))) * scale


@pytest.mark.slow
def test_model_compile_by_name_is_bit_for_bit_a_lambda_by_inductor() -> None:
    """With kernels. (Of an nn.Sequential, model.compile compiles nothing.)"""
    model, x = Rectified(), x_of(rows=64)
    expected = gradients(model, torch.compile(lambda x: model(x), backend="inductor")(x))
    model.compile(backend="fewbit", options={"recipe": "exact", "min_numel": 0, "strict": True})
    y = model(x)
    assert "CompiledFunction" in str(y.grad_fn)
    assert all(map(torch.equal, gradients(model, y), expected))


def test_a_partial_as_one_graph() -> None:
    def scenario(compile: Compile) -> Any:
        model = Rectified()
        y = compile(functools.partial(model.forward, scale=3.0), fullgraph=True)(x_of())
        return [y], gradients(model, y)

    compare(scenario)


def test_a_graph_that_runs_in_plain_aten_leaves_what_another_thread_traces_alone() -> None:
    """What torch notes of the node being traced is global."""
    graph, seen = fx.Graph(), list[object]()

    def look(x: Tensor) -> Tensor:
        seen.append(fx.traceback.get_current_meta())
        return x

    node = graph.call_function(look, (graph.placeholder("x"),))
    node.meta["of"] = "this graph"
    graph.output(node)
    with fx.traceback.preserve_node_meta():
        of_another_thread = fx.traceback.get_current_meta()
        GraphRun(fx.GraphModule({}, graph)).run(torch.ones(2))
    assert seen == [of_another_thread]
    assert seen[0] is of_another_thread


def test_two_threads_that_compile_at_once() -> None:
    """Each with a model and options of its own."""
    torch.compiler.reset()
    found: dict[int, Any] = {}

    def train(bits: int) -> None:
        records: list[Any] = []
        config = FewBitConfig(recipe="derivatives", bits=bits, min_numel=0, strict=True, max_relative_error=10.0)

        def backend(gm: Any, inputs: Any) -> Any:
            kept = kept_by_their_makers(gm, inputs)
            return partition_only(gm, inputs, FewBitPartitioner(config, records.append, kept))

        try:
            model = mlp(nn.GELU(), frozen=True)
            torch.compile(model, backend=backend)(x_of()).sum().backward()
            found[bits] = [s.bits for r in records for s in r.sites if not s.is_exact]
        except BaseException as error:
            found[bits] = error

    threads = [threading.Thread(target=train, args=(bits,)) for bits in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {1: [1], 2: [2]}
