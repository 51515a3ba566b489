"""last_report() tells models apart: the last one's graphs, and a line for each other."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import derivatives_and_masks, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fewbit_fx
from fewbit_fx.dynamo import fewbit_backend
from fewbit_fx.dynamo.records_by_model import History
from fewbit_fx.passes.record import GraphRecord
from fewbit_fx.reporting.report import ModelTotals
from fewbit_fx.torch_private.dynamo import compiled_callable
from fewbit_fx.torch_private.inductor import partition_only


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded does not depend on the kernels; and a process's reports begin with each test."""

    def partition(gm: Any, inputs: Any, partitioner: Any, mode: Any, options: Any) -> Any:
        return partition_only(gm, inputs, partitioner)

    monkeypatch.setattr(fewbit_backend, "compile_with_inductor", partition)
    monkeypatch.setattr(fewbit_backend, "_all_backends", History())


class Block(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Broken(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.up(x))
        torch._dynamo.graph_break()
        return self.down(F.silu(y))


def functions() -> list[str]:
    return derivatives_and_masks(fewbit_fx.last_report().sites)


def others() -> list[tuple[str, int]]:
    return [(m.name, m.count) for m in fewbit_fx.last_report().other_models]


def test_the_last_of_two_models() -> None:
    first, second, x = mlp(nn.SiLU()), Block(), torch.randn(128, 32)
    torch.compile(first, backend="fewbit")(x)
    alone = fewbit_fx.last_report()
    assert (alone.model, alone.other_models, functions()) == ("Sequential", (), ["silu"])
    torch.compile(second, backend="fewbit")(x)
    report = fewbit_fx.last_report()
    assert (report.model, functions()) == ("Block", ["gelu"])
    assert report.other_models == (ModelTotals("Sequential", alone.plain_bytes, alone.fewbit_bytes),)
    *_, totals, before = str(report).splitlines()
    assert totals.startswith(f"bytes saved for backward: torch.compile {report.plain_bytes:,}   ")
    assert before.startswith(f"compiled before: Sequential: torch.compile {alone.plain_bytes:,}   ")
    assert f"fewbit {alone.fewbit_bytes:,} " in before
    assert report.to_dict()["other_models"][0]["name"] == "Sequential"


def test_a_backend_object_tells_its_own_models_apart() -> None:
    backend, other = fewbit_fx.backend(), fewbit_fx.backend()
    x = torch.randn(128, 32)
    for model in (Block(F.silu), Block(F.mish)):
        torch.compile(model, backend=backend)(x)
    torch.compile(mlp(nn.GELU()), backend=other)(x)
    assert derivatives_and_masks(backend.last_report().sites) == ["mish"]
    assert [m.name for m in backend.last_report().other_models] == ["Block"]
    assert other.last_report().other_models == ()
    assert sum(count for _, count in others()) == 2


def test_two_instances_of_one_class() -> None:
    one, two, x = Block(), Block(F.silu), torch.randn(128, 32)
    torch.compile(one, backend="fewbit")(x)
    torch.compile(two, backend="fewbit")(torch.randn(256, 32))
    assert functions() == ["silu"]
    torch.compiler.reset()
    torch.compile(one, backend="fewbit")(x)
    assert functions() == ["gelu"], "the one compiled last"
    assert others() == [("Block", 1)]


def test_all_graphs_of_a_model_with_graph_breaks() -> None:
    broken, x = Broken(), torch.randn(128, 32)
    torch.compile(mlp(nn.Tanh()), backend="fewbit")(x)
    torch.compile(broken, backend="fewbit")(x)
    assert functions() == ["gelu", "silu"]
    assert len(fewbit_fx.last_report().graphs) == 2
    assert others() == [("Sequential", 1)]


def test_a_recompilation_replaces_its_predecessor() -> None:
    compiled = torch.compile(Block(), backend="fewbit", dynamic=False)
    sizes = []
    for rows in (128, 256):
        compiled(torch.randn(rows, 32))
        sizes.append(fewbit_fx.last_report().plain_bytes)
    assert len(fewbit_fx.last_report().graphs) == 1
    assert sizes[1] == 2 * sizes[0]
    with torch.no_grad():
        compiled(torch.randn(512, 32))
    assert fewbit_fx.last_report().plain_bytes == sizes[1], "a graph without a backward has nothing to report"


@pytest.mark.parametrize(
    "compile_it", [lambda m: torch.compile(m, backend="fewbit"), lambda m: m.compile(backend="fewbit")]
)
def test_layers_compiled_one_by_one(compile_it: Callable[[Any], Any]) -> None:
    """Each is a model; those that share the compiled code of another count once."""
    layers = [Block() for _ in range(4)]
    x = torch.randn(128, 32)
    for layer in layers:
        compiled = compile_it(layer)
        x = (layer if compiled is None else compiled)(x)
    x.sum().backward()
    assert functions() == ["gelu"]
    assert 1 + sum(count for _, count in others()) <= 4
    assert {name for name, _ in others()} <= {"Block"}
    lines = [line for line in str(fewbit_fx.last_report()).splitlines() if line.startswith("compiled before")]
    assert len(lines) <= 2


def test_a_checkpointed_block() -> None:
    block = torch.compile(Block(), backend="fewbit")
    checkpoint(block, torch.randn(128, 32, requires_grad=True), use_reentrant=False).sum().backward()
    assert (fewbit_fx.last_report().model, functions()) == ("Block", ["gelu"])


def test_functions() -> None:
    @torch.compile(backend="fewbit")
    def decorated(x: Tensor) -> Tensor:
        return torch.tanh(x).sin()

    x = torch.randn(128, 64, requires_grad=True)
    decorated(x)
    assert fewbit_fx.last_report().model == "decorated"
    torch.compile(F.gelu, backend="fewbit")(x)
    assert (fewbit_fx.last_report().model, functions(), others()) == ("gelu", ["gelu"], [("decorated", 1)])


def test_a_method_belongs_to_its_object() -> None:
    block, x = Block(), torch.randn(128, 32)
    torch.compile(block.forward, backend="fewbit")(x)
    torch.compiler.reset()
    torch.compile(block, backend="fewbit")(x)
    assert (fewbit_fx.last_report().model, others()) == ("Block", [])


def test_a_report_keeps_no_model_alive() -> None:
    reference = train_and_forget(Block())
    gc.collect()
    assert reference() is None
    assert (fewbit_fx.last_report().model, functions()) == ("Block", ["gelu"]), "what is known of it stays"
    for _ in range(3):
        train_and_forget(Block())
        gc.collect()
    assert others() == [("Block", 3)]
    assert len(fewbit_backend._all_backends._models) == 1, "of models that are gone the totals are kept"
    assert "compiled before: Block, 3 of them, each: torch.compile " in str(fewbit_fx.last_report())


def train_and_forget(model: nn.Module) -> weakref.ref[nn.Module]:
    torch.compiler.reset()
    torch.compile(model, backend="fewbit")(torch.randn(128, 32)).sum().backward()
    torch.compiler.reset()
    return weakref.ref(model)


def test_an_id_of_before_is_not_taken_for_the_same_model() -> None:
    class Model:
        def __call__(self) -> None: ...

    history, record = History(), GraphRecord("0/0", 8, 4, ())
    for count in range(20):  # objects made and freed in turn have the same address
        history.add(Model(), "graph", [record])
        assert sum(m.count for m in history.report().other_models) == count


def test_what_cannot_be_told_apart_is_one_model() -> None:
    history, record = History(), GraphRecord("0/0", 8, 4, ())
    for identity in ("one", "two"):
        history.add(None, identity, [record])
    assert (len(history.report().graphs), history.report().other_models) == (2, ())
    assert compiled_callable() is None, "outside of a compilation"


def test_a_compiled_model_can_be_copied_and_pickled() -> None:
    backend = fewbit_fx.backend()
    compiled = torch.compile(Block(torch.tanh), backend=backend)
    compiled(torch.randn(128, 32))
    copy.deepcopy(compiled)
    pickle.loads(pickle.dumps(backend))
    assert backend.last_report().graphs != ()
