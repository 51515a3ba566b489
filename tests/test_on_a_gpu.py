"""What only a GPU shows: its own kernels, its allocator, its graphs. Left out where there is none.

Other tests see the code that a GPU would get, and run it in Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuzzing import GRAPHS, Case, cases, check, random_examples
from hypothesis import given
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fewbit_fx
from bench.measure import held_bytes
from fewbit_fx.config import FewBitConfig
from fewbit_fx.dynamo.listener import Listener
from fewbit_fx.dynamo.partitioned_run import partitioned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
WIDTH, TOKENS = 256, 2048
EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = ("exact", "derivatives", "default", "lean")


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 700), nn.Linear(WIDTH, 700), nn.Linear(700, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(8, -1, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)]
        self.layers = nn.Sequential(conv[0], nn.BatchNorm2d(16), nn.ReLU(), conv[1], nn.SiLU(), conv[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(-1, 16, 16, 16)).reshape(x.shape)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Residual(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 700), nn.GELU(), nn.Linear(700, WIDTH)),
    "frozen mlp": lambda: nn.Sequential(
        nn.Linear(WIDTH, WIDTH), *(layer.requires_grad_(False) for layer in (nn.GELU(), nn.Linear(WIDTH, WIDTH)))
    ),
    "gated mlp": lambda: Residual(nn.RMSNorm(WIDTH), Gated()),
    "attention": lambda: Residual(nn.LayerNorm(WIDTH), Attention()),
    "dropout": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH)),
    "convolutions": Picture,
}


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MODELS[name]().to(GPU, dtype), torch.randn(TOKENS, WIDTH, device=GPU, dtype=dtype, requires_grad=True)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, trained)])


def step(model: nn.Module, x: Tensor, compiled: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient as one vector."""
    torch.manual_seed(1)
    loss = compiled(x).float().square().mean()
    return loss.detach(), gradient(model, loss)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@random_examples(GRAPHS)
@given(cases())
def test_random_models(case: Case) -> None:
    """Codes on a GPU, by plain ATen, and the graphs that torch makes for one."""
    check(case, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_kernels_have_the_gradient_of_the_codes(name: str, recipe: str, dtype: torch.dtype) -> None:
    """Compared with the same codes by plain ATen. A kernel sums in another order, so that some codes are others: what
    those change is less than what codes do, and nothing that makes the gradient worse.
    """
    config = FewBitConfig(recipe=recipe, min_numel=0, strict=True)
    model, x = made(name, dtype)
    plain_loss, _ = step(model, x, torch.compile(model, backend="inductor"))
    torch.compiler.reset()
    backend = fewbit_fx.backend(recipe=recipe, min_numel=0, strict=True)
    loss, found = step(model, x, torch.compile(model, backend=backend))
    if dtype == torch.float32:
        assert torch.equal(loss, plain_loss)
    assert backend.last_report().fewbit_bytes <= backend.last_report().plain_bytes
    if name == "dropout":  # of which ATen draws other numbers than a kernel
        return
    _, exact = step(model, x, model)
    torch.manual_seed(1)
    by_aten = gradient(model, partitioned(model, config, Listener())(x).float().square().mean())
    rounding = 1e-4 if dtype == torch.float32 else 2e-2
    assert error(found, by_aten) <= 0.7 * error(by_aten, exact) + rounding
    assert error(found, exact) <= 1.1 * error(by_aten, exact) + rounding


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["mlp", "gated mlp", "attention", "convolutions"])
def test_the_allocator_holds_what_the_report_says(name: str, recipe: str) -> None:
    model, x = made(name, torch.bfloat16)
    held = {}
    for backend in (fewbit_fx.backend(recipe="exact", recompute=False, masks=False), fewbit_fx.backend(recipe=recipe)):
        torch.compiler.reset()
        compiled = torch.compile(model, backend=backend)
        step(model, x, compiled)
        report = backend.last_report()
        held[backend] = held_bytes(lambda compiled=compiled: compiled(x), GPU), report.fewbit_bytes  # type: ignore
    (plain, said_plain), (coded, said) = held.values()
    assert abs((plain - coded) - (said_plain - said)) <= 512 * 64, "the allocator rounds up to 512 bytes"


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_cuda_graphs(rounding: str) -> None:
    """A replay codes the data that it is given, and has the gradient of a step without graphs."""
    model, x = made("gated mlp")
    options = {"recipe": "lean", "rounding": rounding, "min_numel": 0, "strict": True}
    plain = torch.compile(model, backend=fewbit_fx.backend(**options))
    _, exact = step(model, x, model)
    without = error(step(model, x, plain)[1], exact)
    torch.compiler.reset()
    counters.clear()
    replayed = torch.compile(model, backend=fewbit_fx.backend(mode="reduce-overhead", **options))
    for i in range(6):
        data = (x * (1 + i / 8)).detach().requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        _, found = step(model, data, replayed)
        _, exact = step(model, data, model)
        assert error(found, exact) <= 1.5 * without
    assert not counters["inductor"]["cudagraph_skips"]


def test_rounding_at_random_has_no_bias() -> None:
    """The mean over seeds is nearer to the exact gradient than any one is."""
    model, x = made("gated mlp")
    compiled = torch.compile(model, backend=fewbit_fx.backend(recipe="lean", rounding="stochastic", value_bits=4))
    _, exact = step(model, x, model)

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return gradient(model, compiled(x).float().square().mean())

    found = [seeded(seed) for seed in range(64)]
    assert torch.equal(found[3], seeded(3))
    one = sum(error(g, exact) for g in found) / len(found)
    assert error(torch.stack(found).mean(0), exact) <= 0.25 * one, "1/8 by chance alone"


def test_max_autotune() -> None:
    model, x = made("mlp", torch.bfloat16)
    _, exact = step(model, x, model)
    compiled = torch.compile(model, backend="fewbit", mode="max-autotune-no-cudagraphs")
    assert error(step(model, x, compiled)[1], exact) <= 0.03


def test_float16_with_a_scaler() -> None:
    model, x = made("gated mlp")
    scaler, optimizer = torch.amp.GradScaler("cuda"), torch.optim.SGD(model.parameters(), 1e-3)
    compiled = torch.compile(model, backend="fewbit")
    for _ in range(3):
        with torch.autocast("cuda", torch.float16):
            loss = compiled(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2**16, "no overflow that is ours"
    assert all(p.isfinite().all() for p in model.parameters())


def test_verify_and_explain() -> None:
    model, x = made("gated mlp")
    verdict = fewbit_fx.verify(model, x, loss=lambda model, x: model(x).square().mean())
    assert 0 < verdict.relative_error < 0.03
    report = fewbit_fx.explain(model, x)
    assert report.fewbit_bytes < report.plain_bytes


@pytest.mark.parametrize("bits", [1, 3])
def test_drop_ins(bits: int) -> None:
    model, x = made("mlp")
    _, exact = step(model, x, model)
    before = held_bytes(lambda: model(x), GPU)
    fewbit_fx.convert(model, bits=bits)
    assert held_bytes(lambda: model(x), GPU) < before
    assert error(step(model, x, model)[1], exact) <= (0.3 if bits == 1 else 0.06)


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "torch.distributed.run", "--nproc-per-node", "1", "distributed.py"],
        ["-m", "torch.distributed.run", "--nproc-per-node", "1", "distributed.py", "--mode", "fsdp"],
        ["accelerate_loop.py"],
        ["hf_trainer.py"],
    ],
    ids=lambda command: "-".join(command[-1:]),
)
def test_examples(command: list[str], tmp_path: Path) -> None:
    """On NCCL, and with a trainer that puts the model on the GPU."""
    arguments: list[Any] = [EXAMPLES / word if word.endswith(".py") else word for word in command]
    environment = {**os.environ, "PYTHONPATH": f"{EXAMPLES.parent}"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
