"""Failure is loud or harmless."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import STRICT, check_interface, gradients, mlp, watch
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx.reporting.words import action, because


def break_the_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("made to fail")

    monkeypatch.setattr("fewbit_fx.passes.pipeline.rewrite", fail)


def cached(counter: str) -> int:
    return torch._dynamo.utils.counters["inductor"][counter]


def test_a_fault_warns_once_and_leaves_the_graph_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_rewrite(monkeypatch)
    model, x = mlp(nn.GELU(), width=80), torch.randn(128, 32)  # in no cache yet
    backend = fewbit_fx.backend(recipe="derivatives")
    torch._dynamo.utils.counters.clear()
    with pytest.warns(
        UserWarning, match="left a graph exact after a fault of its own .*made to fail.* strict=True"
    ) as caught:
        y = torch.compile(model, backend=backend)(x)
    found = gradients(model, y.sum())
    assert (cached("fxgraph_cache_bypass"), cached("fxgraph_cache_miss")) == (2, 0), "it may be another's no more"
    assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_saved"] == 0
    assert len([w for w in caught if "fewbit-fx" in str(w.message)]) == 1
    torch.compiler.reset()
    exact = torch.compile(model, backend="inductor")(x)
    assert torch.equal(y, exact)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(model, exact.sum()), strict=True))
    (graph,) = backend.last_report().graphs
    assert graph.plain_bytes == graph.fewbit_bytes
    assert "made to fail" in str(backend.last_report())


def test_strict_raises_the_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_rewrite(monkeypatch)
    with pytest.raises(Exception, match="made to fail"):
        torch.compile(mlp(nn.GELU(), width=96), backend=fewbit_fx.backend(recipe="derivatives", strict=True))(
            torch.randn(128, 32)
        )


def test_a_rewrite_that_saves_nothing_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbit_fx.passes.pipeline.rewrite", lambda plain, plan, names: plain.copy())
    seen = watch(mlp(nn.GELU()), torch.randn(128, 32))
    assert seen.record.plain_bytes == seen.record.fewbit_bytes
    assert "came out no smaller" in because(seen.record.sites[0].reason)


def test_a_site_that_cannot_be_evaluated_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit_fx.passes.derivative import Derivative

    def fail(self: Derivative, x: Any) -> Any:
        raise NotImplementedError("no kernel for float64")

    monkeypatch.setattr(Derivative, "ideal", fail)
    fewbit_fx.passes.representations.derivative_codes.fitted_scheme.cache_clear()
    try:
        seen = watch(mlp(nn.CELU(0.7)), torch.randn(128, 32))
    finally:
        fewbit_fx.passes.representations.derivative_codes.fitted_scheme.cache_clear()
    assert [because(s.reason) for s in seen.record.sites if s.dtype != "bool"] == [
        "its derivative cannot be evaluated: no kernel for float64"
    ]


def test_a_derivative_that_depends_on_a_number_unknown_when_compiling() -> None:
    def scaled(x: Tensor, c: float) -> Tensor:
        return torch.tanh(x * c)

    x = torch.randn(128, 64, requires_grad=True)
    backend = fewbit_fx.backend(recipe="derivatives", strict=True, min_numel=0)
    compiled = torch.compile(scaled, backend=backend)
    for c in (0.5, 0.75, 1.25):
        (found,) = torch.autograd.grad(compiled(x, c).sum(), x)
        expected = c * (1 - torch.tanh(x * c) ** 2)
        assert (found - expected).norm() <= 0.1 * expected.norm()
    assert str(backend.last_report())


def test_good_models_cause_no_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch(mlp(nn.GELU()), torch.randn(128, 32), config=STRICT)
    assert [w for w in caught if "fewbit" in str(w.message)] == []


def test_the_cache_key_covers_sources_and_options() -> None:
    from fewbit_fx.passes.partitioner import FewBitPartitioner

    def key(**options: Any) -> Any:
        return FewBitPartitioner(fewbit_fx.FewBitConfig(**options), lambda record: None).uuid()

    assert key() == key()
    keys = [key(), key(bits=2), key(min_numel=1), key(max_relative_error=0.1), key(derivatives=False), key(masks=False)]
    keys += [key(strict=True), key(skip=("head",)), key(disable="gain"), key(recipe="lean"), key(recompute=False)]
    keys += [
        key(value_bits=4),
        key(norm_bits=4),
        key(softmax_bits=4),
        key(levels="typical"),
        key(rounding="stochastic"),
    ]
    assert len(set(keys)) == len(keys) == 1 + len(fewbit_fx.FewBitConfig.option_names())


@torch.library.custom_op("fewbit_tests::slope_of_float32", mutates_args=(), tags=(torch.Tag.pointwise,))
def slope_of_float32(x: Tensor) -> Tensor:
    assert x.dtype == torch.float32
    return 1 - torch.tanh(x) ** 2


@torch.library.custom_op("fewbit_tests::slope_of_whole_rows", mutates_args=(), tags=(torch.Tag.pointwise,))
def slope_of_whole_rows(x: Tensor) -> Tensor:
    if x.shape[-1] != 64:
        raise KeyError(x.shape)
    return 1 - torch.tanh(x) ** 2


for operator in (slope_of_float32, slope_of_whole_rows):
    operator.register_fake(torch.empty_like)


class ByOperator(torch.autograd.Function):
    """tanh, with a user's operator as its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.slope(ctx.saved_tensors[0]), None


@pytest.mark.parametrize("slope", [slope_of_float32, slope_of_whole_rows])
def test_an_operator_that_raises_leaves_its_own_site_exact(slope: Any) -> None:
    frozen, x = torch.eye(64), torch.randn(64, 64, requires_grad=True)
    seen = watch(lambda x: nn.functional.gelu(nn.functional.linear(ByOperator.apply(x * 2, slope), frozen)) @ frozen, x)
    actions = {s.function: action(s) for s in seen.record.sites}
    assert actions == {"gelu": "coded in 3 bits", "custom": "left exact"}
    (reason,) = (because(s.reason) for s in seen.record.sites if s.function == "custom")
    assert reason.startswith("its derivative cannot be evaluated: ")


def fail_for_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewrite of one site fails halfway, with a plane already in the graph."""
    from fewbit_fx.passes.representations.derivative_codes import MultiplyByLevel

    original = MultiplyByLevel.__call__

    def multiply(self: MultiplyByLevel, inputs: Any, saved: Any) -> Tensor:
        if max(self.scheme.codebook.levels) <= 1:  # tanh's, not GELU's
            raise RuntimeError("made to fail")
        return original(self, inputs, saved)

    monkeypatch.setattr(MultiplyByLevel, "__call__", multiply)


def two_functions(x: Tensor) -> Tensor:
    frozen = torch.eye(64)
    return nn.functional.gelu(torch.tanh(x @ frozen) @ frozen) @ frozen


def test_a_fault_at_one_site_leaves_the_others_coded(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_for_tanh(monkeypatch)
    x = torch.randn(64, 64, requires_grad=True)
    with pytest.warns(
        UserWarning, match="left one site of a graph exact after a fault of its own .*made to fail"
    ) as caught:
        seen = watch(two_functions, x, config=fewbit_fx.FewBitConfig(recipe="derivatives", min_numel=0))
    assert len([w for w in caught if "fewbit-fx" in str(w.message)]) == 1
    assert {s.function: action(s) for s in seen.record.sites} == {"gelu": "coded in 3 bits", "tanh": "left exact"}
    assert "made to fail" in because(seen.happened("tanh")[0].reason)
    check_interface(seen.chosen)


def test_strict_raises_the_fault_of_one_site(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_for_tanh(monkeypatch)
    with pytest.raises(Exception, match="made to fail"):
        watch(two_functions, torch.randn(64, 64, requires_grad=True))
