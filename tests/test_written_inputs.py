"""Inputs that are written to between forward and backward: the gradient is eager PyTorch's all the same."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import saved_dtypes, watch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx.config import FewBitConfig
from fewbit_fx.dynamo.listener import Listener
from fewbit_fx.dynamo.partitioned_run import partitioned
from fewbit_fx.passes.record import GraphRecord

EXACT = FewBitConfig(recipe="exact", strict=True, min_numel=0)
PLAIN = FewBitConfig(recompute=False, disable="find", strict=True)
SIZE = 64
COPY = torch.ops.aten.copy_.default

Write = Callable[[Tensor], None]


class Quantiser(nn.Module):
    """A vector quantiser whose codebook, a buffer, follows an average, as that of a VQ-VAE."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.write, self.encode, self.decode = write, nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.register_buffer("codebook", torch.randn(16, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        nearest = F.embedding(torch.cdist(x, self.codebook).argmin(-1), self.codebook)
        if self.write:
            with torch.no_grad():
                self.codebook.lerp_(torch.zeros_like(self.codebook), 0.5)
        y = self.decode(x + (nearest - x).detach())
        return (x - nearest).square().mean() + torch.sin(nearest * x).mean() + y.square().mean()


class Normalised(nn.Module):
    """Computes with its input, of which no gradient is asked, before the first layer does."""

    def __init__(self, step: int = 1) -> None:
        super().__init__()
        self.step, self.layer = step, nn.Linear(SIZE // step, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x[:, :: self.step].float() - 0.5) / 0.3).square().mean()


def nothing(tensor: Tensor) -> None:
    """No write."""


def in_place(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.zero_()


def unseen(tensor: Tensor) -> None:
    tensor.data.zero_()


def gradient(model: nn.Module, run: Callable[..., Any], x: Tensor, write: Write) -> Tensor:
    """Behind a write to the model's buffers; to the data, where it has none."""
    given = x.clone()
    loss = run(given)
    for tensor in list(model.buffers()) or [given]:
        write(tensor)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def partitioned_gradient(model: nn.Module, x: Tensor, write: Write, config: FewBitConfig, listener: Listener) -> Tensor:
    torch.compiler.reset()
    model = copy.deepcopy(model)
    return gradient(model, partitioned(model, config, listener), x, write)


def check(model: nn.Module, x: Tensor, write: Write) -> GraphRecord:
    """The exact recipe has eager PyTorch's gradient, behind the same writes."""
    eager, listener = copy.deepcopy(model), Listener()
    expected = gradient(eager, eager, x, write)
    torch.testing.assert_close(partitioned_gradient(model, x, write, EXACT, listener), expected)
    (record,) = listener.records
    return record


@pytest.mark.parametrize("write", [nothing, in_place, unseen])
@pytest.mark.parametrize("within", [False, True])
def test_a_codebook_that_is_written_to(within: bool, write: Write) -> None:
    record = check(Quantiser(within), torch.randn(256, SIZE), write)
    assert record.computes_again, "the leaner cut is used, and computes again from what is no codebook"


def saved_input_names(partition: Any) -> set[str]:
    inputs = [n for n in partition.forward.graph.nodes if n.op == "placeholder"]
    return {inputs[i].name for i in partition.saved_inputs()}


@pytest.mark.parametrize("write", [nothing, in_place, unseen])
def test_data_that_are_overwritten(write: Write) -> None:
    """As where a loader copies each batch into the same tensor."""
    x = torch.randint(255, (256, SIZE), dtype=torch.uint8)
    record, size = check(Normalised(), x, write), x.numel()
    assert (record.plain_bytes, record.fewbit_bytes) == (8 * size, 5 * size), "a copy of the data, in a byte each"


def test_data_of_which_a_copy_has_other_strides_are_not_saved() -> None:
    x = torch.randint(255, (256, 2 * SIZE), dtype=torch.uint8)
    seen = watch(Normalised(step=2), x[:, :SIZE], config=EXACT)
    assert saved_input_names(seen.chosen) <= saved_input_names(seen.plain)
    assert torch.uint8 not in saved_dtypes(seen.chosen)
    check(Normalised(step=2), x[:, :SIZE], unseen)


def test_running_statistics_change_nothing_of_the_cut() -> None:
    """They are written to, but no gradient depends on them."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    seen = watch(model, torch.randn(4, 3, 16, 16), config=FewBitConfig(recompute=False, derivatives=False, masks=False))
    assert seen.plain.forward.graph.find_nodes(op="call_function", target=COPY)
    assert all("recompute" not in n.meta for n in seen.plain.forward.graph.nodes)


STEPS: dict[str, Callable[[Tensor, Tensor, nn.Linear], Tensor]] = {
    "add": lambda h, b, w: h + b,
    "sine of it": lambda h, b, w: h * b.sin(),
    "view": lambda h, b, w: (h + b.view(-1).view(b.shape)).tanh(),
    "part": lambda h, b, w: h * torch.sigmoid(b[:1]),
    "select": lambda h, b, w: torch.where(b > 0, h, h.sin()),
    "activation": lambda h, b, w: F.gelu(h),
    "layer": lambda h, b, w: w(h),
    "norm": lambda h, b, w: F.layer_norm(h, h.shape[-1:], bias=b[0].exp()),
}


class Chain(nn.Module):
    """Steps that read a buffer, and a write to it behind some of them."""

    def __init__(self, names: Sequence[str], write_after: int) -> None:
        super().__init__()
        self.names, self.write_after, self.layer = names, write_after, nn.Linear(SIZE, SIZE)
        self.register_buffer("buffer", torch.randn(32, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        for i, name in enumerate(self.names):
            h = STEPS[name](h, self.buffer, self.layer)
            if i == self.write_after:
                with torch.no_grad():
                    self.buffer.mul_(0.5)
        return self.layer(h).square().mean()


def test_what_is_computed_of_it_is_saved_in_its_place() -> None:
    seen = watch(Chain(["sine of it"], write_after=0), torch.randn(32, SIZE), config=EXACT)
    for partition in (seen.plain, seen.chosen):
        written = {n.args[0].name for n in partition.forward.graph.find_nodes(op="call_function", target=COPY)}
        assert len(written) == 1, "the graph writes to it"
        assert not written & saved_input_names(partition)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(list(STEPS)), min_size=2, max_size=6), st.integers(0, 5))
def test_any_computation_with_a_buffer_that_the_graph_writes_to(names: list[str], write_after: int) -> None:
    """torch.compile has a wrong gradient in most of these (torch 2.13). Where eager PyTorch has none, it forbids."""
    torch.manual_seed(0)
    model, x = Chain(names, min(write_after, len(names) - 1)), torch.randn(32, SIZE)
    eager, allowed = copy.deepcopy(model), False
    with contextlib.suppress(RuntimeError):
        gradient(eager, eager, x, nothing)
        allowed = True
    if allowed:
        check(model, x, nothing)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(list(STEPS)), min_size=2, max_size=6))
def test_any_computation_with_a_buffer_that_is_written_to_afterwards(names: list[str]) -> None:
    """Where torch.compile's own cut has eager PyTorch's gradient, so has ours."""
    torch.manual_seed(0)
    model, x = Chain(names, write_after=len(names)), torch.randn(32, SIZE)
    eager = copy.deepcopy(model)
    expected = gradient(eager, eager, x, unseen)
    if torch.allclose(partitioned_gradient(model, x, unseen, PLAIN, Listener()), expected, atol=1e-6):
        check(model, x, unseen)


def test_with_kernels() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = Quantiser(write=True), torch.randn(256, SIZE)
    ours = copy.deepcopy(model)
    expected = gradient(model, model, x, unseen)
    compiled = torch.compile(ours, backend=fewbit_fx.backend(recipe="exact", min_numel=0, strict=True))
    torch.testing.assert_close(gradient(ours, compiled, x, unseen), expected)
