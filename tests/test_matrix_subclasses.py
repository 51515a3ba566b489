"""The matrix: tensor subclasses, hooks, parametrizations, tied weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import SwiGLU, mlp
from recording import LEAN, Recording, check_all, run
from subclasses import Quantized, Wrapped
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


class AdaptedLinear(nn.Module):
    """A frozen layer in few bits with a trained adapter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs) / inputs**0.5
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter(Quantized((weight / scale).round().to(torch.int8), scale), requires_grad=False)
        self.down, self.up = nn.Parameter(torch.randn(4, inputs) / 6), nn.Parameter(torch.randn(outputs, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + x @ self.down.t() @ self.up.t()


def test_weights_in_few_bits_as_in_qlora() -> None:
    gate, up, down = AdaptedLinear(32, 64), AdaptedLinear(32, 64), AdaptedLinear(64, 32)
    trained = [p for m in (gate, up, down) for p in (m.down, m.up)]
    x = torch.randn(64, 32)
    recording, _ = run(lambda: down(F.silu(gate(x)) * up(x)).square().mean(), trained, LEAN)
    assert recording.check() == 1
    assert recording.fewbit_bytes < recording.plain_bytes / 2


def test_activations_of_a_class_of_ones_own() -> None:
    torch.compiler.reset()
    model, x = mlp(nn.GELU()), torch.randn(64, 32)
    recording = Recording(LEAN)
    y = torch.compile(lambda x: model(x * 2), backend=recording.backend)(Wrapped(x))
    y.backward(Wrapped(torch.ones(64, 16)))
    assert isinstance(y, Wrapped)
    assert recording.check() == 1
    assert recording.coded
    assert recording.fewbit_bytes < recording.plain_bytes


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A process group of one, in this process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_distributed_tensors(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

    torch.compiler.reset()
    model, x = distribute_module(mlp(nn.GELU()), mesh), torch.randn(64, 32)
    recording = Recording(LEAN)
    y = torch.compile(model, backend=recording.backend)(distribute_tensor(x, mesh, [Shard(0)]))
    assert isinstance(y, DTensor)
    y.redistribute(mesh, [Replicate()]).to_local().square().mean().backward()
    assert recording.check() == 1
    assert recording.coded
    assert recording.fewbit_bytes < recording.plain_bytes


HOOKS: dict[str, Callable[[], Any]] = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: (t.clone(),), lambda t: t[0]),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_on_saved_tensors_are_given_codes(name: str) -> None:
    model, x = nn.Sequential(mlp(nn.GELU()), nn.Linear(16, 32), mlp(nn.SiLU())), torch.randn(64, 32)
    with HOOKS[name]():
        recording, found = run(lambda: model(x).square().mean(), [*model.parameters()], LEAN)
    _, expected = run(lambda: model(x).square().mean(), [*model.parameters()], LEAN)
    assert recording.check() == 1
    assert recording.fewbit_bytes < recording.plain_bytes
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Hooked(nn.Module):
    """Hooks of each kind. Dynamo breaks the graph at those of the backward, with any backend."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between, self.after = mlp(nn.GELU()), nn.Linear(16, 32), mlp(nn.SiLU())
        self.before[1].register_forward_hook(lambda module, given, result: result * 2)
        self.between.register_full_backward_hook(lambda module, into, out: (into[0] * 2,))
        self.between.register_full_backward_pre_hook(lambda module, out: (out[0] * 3,))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x = self.between(x)  # not in a loop: torch 2.11 compiles nothing of a loop at which the graph breaks
        return self.after(x).square().mean()


def test_hooks_of_modules() -> None:
    model, x = Hooked(), torch.randn(64, 32)
    recording = check_all(lambda: model(x), [*model.parameters()])
    assert len(recording.graphs) == 2


@pytest.mark.parametrize("parametrization", [weight_norm, spectral_norm])
def test_parametrizations(parametrization: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(parametrization(nn.Linear(32, 64)), nn.GELU(), parametrization(nn.Linear(64, 16))).eval()
    x = torch.randn(64, 32)
    check_all(lambda: model(x).square().mean(), [*model.parameters()])


def test_tied_weights() -> None:
    embedding, model, head = nn.Embedding(128, 32), SwiGLU(), nn.Linear(32, 128, bias=False)
    head.weight, tokens = embedding.weight, torch.randint(0, 128, (4, 16))

    def loss() -> Tensor:
        return F.cross_entropy(head(model(embedding(tokens))).flatten(0, 1), tokens.flatten())

    check_all(loss, [embedding.weight, *model.parameters()])
