"""Compiled models: forward bit for bit inductor's, gradients those of the oracle."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
import torch.nn.functional as F
from helpers import Oracle, TransformerBlock, close_to_oracle, gradients, lora, mlp, oracle_factor
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx.reporting.words import action

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def train_step(model: nn.Module, x: Tensor, backend: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients (of parameters and x) of one step, from one seed."""
    torch.compiler.reset()
    torch.manual_seed(1)
    compiled = torch.compile(model, backend=backend, options=options or None)
    y = compiled(x)
    wanted = [p for p in [*model.parameters(), x] if p.requires_grad]
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y.detach(), list(torch.autograd.grad((y * weights).sum(), wanted))


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor, backend: Any) -> tuple[Tensor, Tensor]:
    """f(x), and the gradient of x under a gradient of ones."""
    torch.compiler.reset()
    leaf = x.detach().requires_grad_()
    y = torch.compile(function, backend=backend)(leaf + 0)  # a leaf itself lives anyway, and is left exact
    y.backward(torch.ones_like(y))
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@pytest.mark.one_in(8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 3])
def test_each_gradient_is_the_nearest_level(dtype: torch.dtype, bits: int) -> None:
    """Against exhaustive comparison, element by element; undecided elements are those at a boundary."""
    x = torch.randn(64, 96).to(dtype)
    backend = fewbit_fx.backend(recipe="derivatives", bits=bits, strict=True, min_numel=0)
    y, gradient = elementwise(F.gelu, x, backend)
    exact_y, exact_gradient = elementwise(F.gelu, x, "inductor")
    (site,) = backend.last_report().sites
    assert action(site) == f"coded in {bits} bit{'s' if bits > 1 else ''}"
    assert len(site.levels) == 2**bits
    assert torch.equal(y, exact_y)
    assert not torch.equal(gradient, exact_gradient)
    factor, certain = oracle_factor(F.gelu, x, site.levels)
    assert certain.float().mean() > 0.99
    # One rounding to the gradient's dtype, and one to float32 of the level.
    torch.testing.assert_close(gradient[certain], factor.to(torch.float32).to(dtype)[certain], rtol=2**-23, atol=0)


@pytest.mark.one_in(14)
@pytest.mark.parametrize(
    "function",
    [F.silu, F.softplus, lambda x: 3 * torch.tanh(x), F.elu, F.mish, lambda x: x / (1 + x * x).sqrt(), torch.sin],
)
def test_other_functions_too(function: Callable[[Tensor], Tensor]) -> None:
    """The output of tanh itself, from which its derivative follows, must not be the graph's."""
    x = torch.randn(64, 96) * 2
    backend = fewbit_fx.backend(recipe="derivatives", strict=True, min_numel=0)
    y, gradient = elementwise(function, x, backend)
    (site,) = backend.last_report().sites
    assert action(site) == "coded in 3 bits"
    assert torch.equal(y, elementwise(function, x, "inductor")[0])
    factor, certain = oracle_factor(function, x, site.levels)
    torch.testing.assert_close(gradient[certain], factor.float()[certain], rtol=2**-22, atol=0)


def test_a_network_against_the_eager_oracle() -> None:
    """Linear, GELU, linear: all gradients as if eager PyTorch had used the same levels."""
    model, x = mlp(nn.GELU()), torch.randn(128, 32)
    backend = fewbit_fx.backend(recipe="derivatives", strict=True, min_numel=0)
    found = gradients(model, torch.compile(model, backend=backend)(x).sum())
    reference = nn.Sequential(model[0], Oracle(F.gelu, backend.last_report().sites[0].levels), model[2])
    assert close_to_oracle(found, gradients(reference, reference(x).sum()))


def two_blocks() -> nn.Module:
    return nn.Sequential(TransformerBlock(), TransformerBlock())


def adapted_block() -> nn.Module:
    return lora(TransformerBlock())


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (TransformerBlock, torch.float32),
        pytest.param(two_blocks, torch.float32, marks=pytest.mark.slow),
        pytest.param(two_blocks, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(adapted_block, torch.float32, marks=pytest.mark.slow),
        pytest.param(adapted_block, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_a_transformers_forward_is_bit_identical(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model, x = make().to(dtype), torch.randn(4, 32, 32, dtype=dtype, requires_grad=True)
    y, found = train_step(model, x, "fewbit", recipe="derivatives", strict=True)
    exact_y, exact = train_step(model, x, "inductor")
    assert any(action(s) == "coded in 3 bits" for s in fewbit_fx.last_report().sites)
    assert torch.equal(y, exact_y)
    error = sum(float((a - b).float().norm() ** 2) for a, b in zip(found, exact, strict=True)) ** 0.5
    assert (
        0 < error <= 0.1 * sum(float(b.float().norm() ** 2) for b in exact) ** 0.5
    )  # the codebook's own error is 6.4 %


class Residual(nn.Module):
    """Tensors that are saved, stored as codes, and go on in the same kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.last = (
            nn.Linear(256, 256),
            nn.LayerNorm(256),
            nn.Linear(256, 256),
            nn.RMSNorm(256),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).sin() + x
        return self.last(self.second(self.norm(h)) * h.cos() + h)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_forward_is_as_near_to_that_of_float32(dtype: torch.dtype) -> None:
    """A kernel rounds what it stores, and codes take the place of some of it: bits are not inductor's, errors are."""
    model, x = Residual().to(dtype), torch.randn(64, 256).to(dtype)
    exact = copy.deepcopy(model).float()(x.float()).detach()
    errors = {}
    for name, backend in (("inductor", "inductor"), ("fewbit", fewbit_fx.backend(min_numel=0, strict=True))):
        torch.compiler.reset()
        y = torch.compile(model, backend=backend)(x).detach()
        errors[name] = float((y.float() - exact).norm())
    assert 0 < errors["fewbit"] <= 1.02 * errors["inductor"]


@pytest.mark.one_in(24)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [63, 64])
@pytest.mark.parametrize("frozen", [False, True])
def test_relu_and_dropout_gradients_are_bit_identical(dtype: torch.dtype, width: int, frozen: bool) -> None:
    model = mlp(nn.Sequential(nn.ReLU(), nn.Dropout(0.3)), width=width, frozen=frozen).to(dtype)
    x = torch.randn(128, 32, dtype=dtype, requires_grad=True)
    backend = fewbit_fx.backend(recipe="derivatives", strict=True, min_numel=0)
    y, found = train_step(model, x, backend)
    masks = [s for s in backend.last_report().sites if action(s) == "exact one-bit mask"]
    assert {s.function for s in masks} >= {"dropout"}
    blocks = -(-128 * width // 1024)
    assert all(s.bytes_before == 128 * width and s.bytes_after == blocks * 1024 // 8 for s in masks)
    exact_y, exact = train_step(model, x, "inductor")
    assert torch.equal(y, exact_y)
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("width", [63, 64])
def test_symbolic_shapes_run_at_many_sizes_with_one_compilation(width: int) -> None:
    coded, masked = mlp(nn.GELU(), width=width), mlp(nn.Sequential(nn.ReLU(), nn.Dropout(0.3)), width=width)
    backends = {model: fewbit_fx.backend(recipe="derivatives", strict=True, min_numel=0) for model in (coded, masked)}
    ways = [(m, way, b) for m in (coded, masked) for way, b in (("fewbit", backends[m]), ("inductor", "inductor"))]
    compiled = {(m, way): torch.compile(m, backend=b, dynamic=True) for m, way, b in ways}
    for rows in (40, 41, 64, 100):
        x = torch.randn(rows, 32)
        results = {}
        for (model, way), run in compiled.items():
            torch.manual_seed(rows)
            y = run(x)
            results[model, way] = [y.detach(), *gradients(model, y.sum())]
        levels = next(s.levels for s in backends[coded].last_report().sites if s.levels)
        reference = nn.Sequential(coded[0], Oracle(F.gelu, levels), coded[2])
        assert torch.equal(results[coded, "fewbit"][0], results[coded, "inductor"][0])
        assert close_to_oracle(results[coded, "fewbit"][1:], gradients(reference, reference(x).sum()))
        assert all(map(torch.equal, results[masked, "fewbit"], results[masked, "inductor"]))
    reports = [backend.last_report() for backend in backends.values()]
    assert sum(len(report.graphs) for report in reports) == 2
    assert {action(s) for report in reports for s in report.sites} >= {"coded in 3 bits", "exact one-bit mask"}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A cache of its own: torch 2.11's knows that autocast is on but not to which dtype, and returns the other graph.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = mlp(nn.GELU()), torch.randn(128, 32)
    backend = fewbit_fx.backend(recipe="derivatives", strict=True)
    outputs = []
    for chosen in ("inductor", backend):
        torch.compiler.reset()
        with torch.autocast("cpu", dtype=dtype):
            y = torch.compile(model, backend=chosen)(x)
        outputs.append((y.detach(), gradients(model, y.float().sum())))
    (exact_y, exact), (y, found) = outputs
    assert y.dtype == dtype
    assert torch.equal(y, exact_y)
    assert all((a - b).norm() <= 0.1 * b.norm() for a, b in zip(found, exact, strict=True))
    assert [s.dtype for s in backend.last_report().sites] == [str(dtype).removeprefix("torch.")]


def test_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.SiLU(), nn.Conv2d(16, 4, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 18, 18).to(memory_format=torch.channels_last)
    backend = fewbit_fx.backend(recipe="derivatives", strict=True)
    y = torch.compile(model, backend=backend)(x)
    found = gradients(model, y.sum())
    (site,) = backend.last_report().sites
    reference = nn.Sequential(model[0], Oracle(F.silu, site.levels), model[2])
    assert close_to_oracle(found, gradients(reference, reference(x).sum()))
    torch.compiler.reset()
    assert torch.equal(y, torch.compile(model, backend="inductor")(x))


def test_graph_breaks_make_several_graphs() -> None:
    first, second = mlp(nn.GELU()), nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 4))

    def broken(x: Tensor) -> Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y)

    backend = fewbit_fx.backend(recipe="derivatives", strict=True)
    torch.compile(broken, backend=backend)(torch.randn(128, 32)).sum().backward()
    report = backend.last_report()
    assert [s.function for s in report.sites] == ["gelu", "silu"]
    assert len(report.graphs) == 2


@pytest.mark.parametrize(
    ("options", "own"), [({}, True), ({"reorder-for-peak-memory": True}, False), ({"recipe": "exact"}, False)], ids=str
)
def test_a_backward_with_codes_keeps_its_order(
    options: dict[str, Any], own: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Inductor's order for the least peak would decode all layers first, as it counts what no kernel writes."""
    seen = {}

    def spy(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        seen["backward" if kwargs.get("is_backward") else "forward"] = torch._inductor.config.reorder_for_peak_memory
        return compile_fx_inner(gm, inputs, **kwargs)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compile_fx_inner = torch._inductor.compile_fx.compile_fx_inner
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))

    def train(**options: Any) -> None:
        torch.compiler.reset()
        backend = fewbit_fx.backend(min_numel=0, options=options)
        torch.compile(model, backend=backend)(torch.randn(128, 32)).sum().backward()

    train(**({} if options else {"reorder_for_peak_memory": True}))  # torch's caches must tell it from what follows
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx_inner", spy)
    train(**options)
    assert seen == {"forward": True, "backward": not own}


@pytest.mark.parametrize("how", ["mode", "options", "backend object"])
def test_modes_and_inductor_options_reach_inductor(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(gm: Any, inputs: Any, partitioner: Any, mode: Any, options: Any) -> Any:
        seen.update(mode=mode, options=options, bits=partitioner._config.bits)
        return gm.forward

    monkeypatch.setattr("fewbit_fx.dynamo.fewbit_backend.compile_with_inductor", spy)
    x, model = torch.randn(4, 4), nn.Linear(4, 4)
    if how == "mode":
        torch.compile(model, backend="fewbit", mode="max-autotune-no-cudagraphs")(x)
        assert seen == {"mode": "max-autotune-no-cudagraphs", "options": {}, "bits": 3}
        torch.compiler.reset()
        torch.compile(model, backend="fewbit", options={"mode": "max-autotune-no-cudagraphs", "bits": 2})(x)
        assert seen == {"mode": "max-autotune-no-cudagraphs", "options": {}, "bits": 2}
    elif how == "options":
        torch.compile(model, backend="fewbit", options={"bits": 4, "epilogue_fusion": False})(x)
        assert seen == {"mode": None, "options": {"epilogue_fusion": False}, "bits": 4}
    else:
        backend = fewbit_fx.backend(recipe="derivatives", bits=1, options={"epilogue_fusion": False})
        torch.compile(model, backend=backend)(x)
        assert seen == {"mode": None, "options": {"epilogue_fusion": False}, "bits": 1}


def test_an_inductor_option_takes_effect() -> None:
    model, x = mlp(nn.GELU()), torch.randn(128, 32)
    train_step(model, x, "fewbit", recipe="derivatives", bits=2, epilogue_fusion=False)
    assert "coded in 2 bits" in {action(s) for s in fewbit_fx.last_report().sites}


def test_inference_compiles_and_reports_nothing() -> None:
    backend = fewbit_fx.backend(recipe="derivatives", strict=True)
    model, x = mlp(nn.GELU()), torch.randn(128, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert backend.last_report().graphs == ()
    assert "no graph with a backward" in str(backend.last_report())


def test_training_converges_as_without() -> None:
    """Digits of two moving averages: after 60 steps the losses agree to 2 %."""

    def final_loss(backend: Any) -> float:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = mlp(nn.GELU(), width=128)
        x = torch.randn(512, 32)
        target = torch.sin(3 * x[:, :16])
        compiled = torch.compile(model, backend=backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.mse_loss(compiled(x), target)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    exact, ours = final_loss("inductor"), final_loss(fewbit_fx.backend(recipe="derivatives", strict=True))
    assert ours == pytest.approx(exact, rel=0.02)
    assert exact < 0.45  # from about 0.6: it did learn


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_another_default_dtype_changes_nothing() -> None:
    x = torch.randn(64, 96, dtype=torch.float32)
    _, expected = elementwise(F.gelu, x, fewbit_fx.backend(recipe="derivatives", strict=True, min_numel=0))
    with _default_dtype(torch.float64):
        _, found = elementwise(F.gelu, x, fewbit_fx.backend(recipe="derivatives", strict=True, min_numel=0))
    assert torch.equal(found, expected)
