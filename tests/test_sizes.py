"""Sizes that are known from data only, jagged ones, and none at all: coded, or exact with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT, watch
from recording import LEAN, Recording
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx.passes.gain import NOT_SAVED
from fewbit_fx.passes.plan import EMPTY, SIZE_FROM_DATA, SIZE_NOT_IN_BACKWARD
from fewbit_fx.reporting.words import action, because

WEIGHT = torch.randn(64, 64) / 8
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "dropout": lambda h: F.dropout(h, 0.5),
    "silu, dropout": lambda h: F.dropout(F.silu(h), 0.5),
}
SELECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "by a mask": lambda x, keep: x[keep],
    "by nonzero": lambda x, keep: x[keep.nonzero().squeeze(1)],
    "masked_select": lambda x, keep: x.masked_select(keep.unsqueeze(1)).view(-1, 64),
    "repeated": lambda x, keep: x.repeat_interleave(keep.long(), 0),
}


@pytest.fixture
def captured_sizes() -> Iterator[None]:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("captured_sizes")
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_size_from_data_is_exact_and_the_rest_is_coded(name: str, selection: str) -> None:
    def run(x: Tensor, keep: Tensor) -> Tensor:
        y = F.gelu(x @ WEIGHT) @ WEIGHT
        return FUNCTIONS[name](SELECTIONS[selection](y, keep) * 2) @ WEIGHT

    x, keep = torch.randn(200, 64, requires_grad=True), torch.rand(200) > 0.5
    seen = watch(run, x, keep)
    assert [action(s) for s in seen.coded if s.dtype != "bool"] == ["coded in 3 bits"]
    assert SIZE_FROM_DATA in {s.reason for s in seen.record.sites}
    assert seen.record.fewbit_bytes < seen.record.plain_bytes
    assert seen.output.shape == (int(keep.sum()), 64)


@pytest.mark.usefixtures("captured_sizes")
def test_no_rows_at_run_time() -> None:
    """An expert without tokens, with a width that fills blocks of bits."""
    backend = fewbit_fx.backend(recipe="derivatives", min_numel=0, strict=True)
    compiled = torch.compile(lambda x, keep: F.gelu(x[keep] * 2), backend=backend, fullgraph=True)
    x = torch.randn(200, 512, requires_grad=True)
    for rows in (150, 0, 3):
        keep = torch.arange(200) < rows
        y = compiled(x, keep)
        (found,) = torch.autograd.grad(y.sum(), x)
        (expected,) = torch.autograd.grad(F.gelu(x[keep] * 2).sum(), x)
        assert y.shape == (rows, 512)
        torch.testing.assert_close(found, expected)
    (site,) = backend.last_report().sites
    assert site.reason == because(SIZE_FROM_DATA)


def test_no_elements_when_compiling() -> None:
    seen = watch(lambda x: F.gelu(x * 2) @ WEIGHT, torch.randn(0, 64, requires_grad=True), config=STRICT)
    assert [s.reason for s in seen.record.sites] == [EMPTY]


def test_rows_that_come_and_go() -> None:
    """A dynamic dimension, recompiled for no rows."""
    backend = fewbit_fx.backend(recipe="derivatives", min_numel=0, strict=True)
    compiled = torch.compile(lambda x: F.gelu(x * 2) @ WEIGHT, backend=backend, dynamic=True)
    for rows in (8, 0, 33, 1, 0):
        x = torch.randn(rows, 64, requires_grad=True)
        (g,) = torch.autograd.grad(compiled(x).sum(), x)
        assert g.shape == (rows, 64)
        assert torch.isfinite(g).all()


JAGGED: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5).values(),
    "relu": lambda x: F.relu(x * 2).values(),
    "gelu": lambda x: F.gelu(x * 2).values() @ WEIGHT,
    "linear, gelu, dropout": lambda x: F.dropout(F.gelu(x @ WEIGHT), 0.1).values() @ WEIGHT,
    "silu of values": lambda x: F.silu(x.values() * 2) @ WEIGHT,
}


@pytest.mark.parametrize("name", JAGGED)
def test_jagged_tensors(name: str) -> None:
    parts = [torch.randn(n, 64) for n in (13, 40)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    report = fewbit_fx.explain(JAGGED[name], x, fewbit_config=STRICT)
    assert all(not graph.note for graph in report.graphs)
    assert report.fewbit_bytes <= report.plain_bytes
    reasons = {s.reason for s in report.sites if s.is_exact}
    unknown = {because(SIZE_FROM_DATA), because(SIZE_NOT_IN_BACKWARD), because(NOT_SAVED)}
    assert reasons <= unknown or name in ("relu", "gelu")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("width", [63, 64])
@pytest.mark.parametrize("norm", [False, True])
def test_a_length_that_lies_innermost_in_memory_stays_a_symbol(norm: bool, width: int, rounding: str) -> None:
    """Whether blocks go together with its dimension is not asked: the answer would be a guard, and a graph for each."""
    recording = Recording(LEAN.updated({"norm_bits": 8, "rounding": rounding, "recompute": False}))
    layer = nn.Linear(width, width)

    def step(x: Tensor) -> Tensor:
        return layer(F.layer_norm(x, (width,)) if norm else F.gelu(x)).square().mean()

    compiled = torch.compile(step, backend=recording.backend, dynamic=True)
    for length in (32, 48, 33):
        x = torch.randn(2, width, length).transpose(1, 2).requires_grad_()
        compiled(x * 1).backward()  # a leaf itself lives anyway
        assert x.grad is not None
    (graph,) = recording.graphs
    assert len(graph.backward) == 3
    (record,) = graph.records
    assert any(s.function != "linear input" and not s.is_exact for s in record.sites)
