"""The trainers of other libraries: each example with fewbit and with inductor.

Graphs run in plain ATen but in the last test, for what is tested is how a trainer reaches the backend: all that comes
before kernels, the partition included, is Inductor's own.
"""

from __future__ import annotations

import csv
import functools
import gc
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plain_aten
import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import compile_fx

import fewbit_fx
from fewbit_fx.torch_private.modules import is_compiled

ROOT = Path(__file__).parent.parent
TRL_IS_LARGE = "trl is not installed: with datasets, pyarrow and pandas it is 270 MB, too much for the test extra"
BYTES = ("fewbit/saved_bytes", "fewbit/saved_bytes_inductor")


@pytest.fixture
def no_kernels() -> Iterator[None]:
    """Plain ATen in place of generated kernels."""
    with plain_aten.no_kernels():
        yield


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate and Lightning keep settings in variables of the environment and in singletons."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def inductor_instead() -> Iterator[None]:
    """Whatever asks for fewbit gets Inductor."""

    def compile_plainly(self: object, gm: fx.GraphModule, inputs: Any, **kwargs: object) -> Any:
        return compile_fx.compile_fx(gm, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fewbit_fx.FewBitBackend, "__call__", compile_plainly)
        yield


@contextmanager
def held_for_backwards() -> Iterator[list[int]]:
    """Bytes that autograd holds for each backward, each storage once and without parameters: no report is asked."""
    held: list[int] = []
    saved_now: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        saved_now.append(saved)
        return saved

    def unpack(saved: Tensor) -> Tensor:
        if saved_now:
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved_now}
            parameters = [value for value in gc.get_objects() if issubclass(type(value), nn.Parameter)]
            held.append(sum({**storages, **{p.untyped_storage().data_ptr(): 0 for p in parameters}}.values()))
            saved_now.clear()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield held


def example(name: str) -> Callable[[list[str]], Any]:
    """The ``main`` of an example."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / f"examples/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dynamo looks up a function's globals there
    spec.loader.exec_module(module)
    main: Callable[[list[str]], Any] = module.main
    return main


def run(name: str, *flags: str, backward: int = 0) -> tuple[Any, int]:
    """What two steps of an example return, and the bytes held for one backward."""
    torch.compiler.reset()
    with held_for_backwards() as held:
        result = example(name)([*flags, "--steps", "2"])
    return result, held[backward]


def check(fewbit_losses: list[float], plain_losses: list[float], held: int, plain_held: int, saved: list[int]) -> None:
    """The same forward, fewer bytes, and a report that says how many.

    What the trainer keeps outside of the compiled model, its loss for instance, is held with either backend.
    """
    assert fewbit_losses[0] == plain_losses[0], "bit for bit"
    assert abs(fewbit_losses[1] - plain_losses[1]) < 1e-2 * (plain_losses[0] - plain_losses[1]), "it learns as much"
    assert held - saved[0] == plain_held - saved[1], "the report's bytes are those held"
    assert held < plain_held


HF = {
    "float32": [],
    "bf16": ["--bf16"],
    "checkpointing": ["--gradient-checkpointing"],
    "lora": ["--lora"],
}


@functools.cache
def hf_trainer(case: str) -> tuple[tuple[Any, int], tuple[Any, int]]:
    """The example of transformers with fewbit and with inductor."""
    coded = run("hf_trainer", *HF[case])
    with inductor_instead():
        return coded, run("hf_trainer", *HF[case])


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("case", [pytest.param("bf16", marks=pytest.mark.slow), "float32", "checkpointing", "lora"])
def test_a_trainer_of_transformers_saves_fewer_bytes_at_the_same_loss(case: str) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    if "lora" in case:
        pytest.importorskip("peft")
    (log, held), (plain_log, plain_held) = hf_trainer(case)
    losses, plain_losses = ([step["loss"] for step in found if "loss" in step] for found in (log, plain_log))
    check(losses, plain_losses, held, plain_held, [log[0][name] for name in BYTES])
    assert not set(BYTES) & set(log[1]), "once is enough"
    assert printed_in_docs(case, log[0]["fewbit/saved_bytes"], log[0]["fewbit/saved_bytes_inductor"])


@pytest.mark.usefixtures("no_kernels")
def test_checkpointed_layers_stay_checkpointed() -> None:
    """What codes save comes on top of what checkpointing saves."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    (_, coded), _ = hf_trainer("float32")
    (_, both), (_, checkpointed) = hf_trainer("checkpointing")
    assert both < checkpointed < coded


@pytest.mark.usefixtures("no_kernels")
def test_trls_trainer_saves_fewer_bytes_at_the_same_loss() -> None:
    pytest.importorskip("trl", reason=TRL_IS_LARGE)
    log, held = run("trl_sft")
    with inductor_instead():
        plain_log, plain_held = run("trl_sft")
    losses, plain_losses = ([step["loss"] for step in found if "loss" in step] for found in (log, plain_log))
    check(losses, plain_losses, held, plain_held, [log[0][name] for name in BYTES])
    assert log[0]["mean_token_accuracy"] == plain_log[0]["mean_token_accuracy"], "TRL's own numbers stay what they are"
    assert printed_in_docs("trl_sft", *(log[0][name] for name in BYTES))


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("name", ["accelerate_loop", pytest.param("lightning_fabric", marks=pytest.mark.slow)])
def test_a_loop_saves_fewer_bytes_at_the_same_loss(name: str) -> None:
    pytest.importorskip("accelerate" if name == "accelerate_loop" else "lightning")
    losses, held = run(name)
    report = fewbit_fx.last_report()
    with inductor_instead():
        plain_losses, plain_held = run(name)
    check(losses, plain_losses, held, plain_held, [report.fewbit_bytes, report.plain_bytes])
    assert printed_in_docs(name, report.fewbit_bytes, report.plain_bytes)


@pytest.mark.usefixtures("no_kernels")
def test_lightnings_trainer_saves_fewer_bytes_at_the_same_loss() -> None:
    pytest.importorskip("lightning")
    table, held = run("lightning_trainer", backward=-1)  # the first are those of the error's measurement
    with inductor_instead():
        plain_table, plain_held = run("lightning_trainer", backward=-1)
    losses, plain_losses = (column(found, "loss") for found in (table, plain_table))
    saved = [int(column(table, name)[0]) for name in BYTES]
    check(losses, plain_losses, held, plain_held, saved)
    (error,) = column(table, "fewbit/gradient_error")
    assert 0 < error < 0.05
    assert printed_in_docs("lightning_trainer", *saved)


def column(table: str, name: str) -> list[float]:
    """The numbers of a column of a table that Lightning's CSVLogger writes."""
    return [float(row[name]) for row in csv.DictReader(io.StringIO(table)) if row[name]]


def printed_in_docs(name: str, saved: int, plain: int) -> bool:
    """Whether docs/trainers.md has these bytes; with another torch than the one it names, other bytes are as good."""
    text = (ROOT / "docs/trainers.md").read_text()
    (version,) = set(re.findall(r"torch (\d+\.\d+\.\d+)", text))
    return f"| {plain:,} | {saved:,} |" in text or not torch.__version__.startswith(version)


class Bytes(nn.Module):
    """A model with a loss, and dropout, that a Trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(256, 32), nn.Linear(32, 64), nn.Linear(64, 256)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = nn.functional.dropout(nn.functional.gelu(self.up(self.embed(input_ids))), 0.1, self.training)
        logits = self.down(hidden)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def loss_of(model: nn.Module, **batch: Tensor) -> Tensor:
    return model(**batch)["loss"]


def trainer(folder: Path, *callbacks: Any, model: nn.Module | None = None, **arguments: Any) -> Any:
    """A Trainer of transformers on random bytes."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    rows = torch.randint(256, (32, 64))
    settings = {"max_steps": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return Trainer(
        model or Bytes(),
        TrainingArguments(str(folder), save_strategy="no", **{**settings, **arguments}),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=list(callbacks),
    )


def callback(**options: Any) -> Any:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from fewbit_fx.integrations.transformers import FewBitCallback

    return FewBitCallback(min_numel=0, **options)


@pytest.mark.usefixtures("no_kernels")
def test_measuring_the_error_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    """Rows are shuffled and dropout draws: one number more from the random state would change the losses."""
    logs = []
    for every in (None, 2):
        made = callback(every=every, loss=loss_of)
        torch.manual_seed(0)
        training = trainer(tmp_path, made, model=Bytes().eval())  # as from_pretrained returns a model
        training.train()
        logs.append(training.state.log_history)
        torch.compiler.reset()
    without, measured = logs
    assert [step.get("loss") for step in measured] == [step.get("loss") for step in without]
    errors = [(step["step"], step["fewbit/gradient_error"]) for step in measured if "fewbit/gradient_error" in step]
    assert errors == [(step + 1, found.relative_error) for step, found in made.history], "logged when its step is done"
    assert [step for step, _ in made.history] == [0, 2]
    assert all(0 < found.relative_error < 0.1 and found.loss_identical for _, found in made.history)
    assert made.history[0][1].bytes_after == measured[0]["fewbit/saved_bytes"]


@pytest.mark.usefixtures("no_kernels")
def test_a_model_that_is_compiled_already_stays_so_and_its_bytes_are_logged(tmp_path: Path) -> None:
    model, mine = Bytes(), fewbit_fx.backend(recipe="exact", min_numel=0)
    model.compile(backend=mine)
    made = callback()
    training = trainer(tmp_path, made, model=model)
    training.train()
    assert not made.backend.last_report().graphs
    assert training.state.log_history[0]["fewbit/saved_bytes"] == mine.last_report().fewbit_bytes


@pytest.mark.usefixtures("no_kernels")
def test_checkpoints_keep_the_names_of_the_model(tmp_path: Path) -> None:
    training = trainer(tmp_path, callback(), max_steps=1)
    training.train()
    assert is_compiled(training.model)
    assert list(training.model.state_dict()) == list(Bytes().state_dict())


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("first", [True, False])
def test_reporters_hear_a_callback_that_is_put_before_them(tmp_path: Path, first: bool) -> None:
    """As docs/trainers.md says: reporters are told before the callbacks of a Trainer."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.heard: list[str] = []

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            self.heard += logs

    reporter = Reporter()
    training = trainer(tmp_path, reporter, max_steps=1)
    training.callback_handler.callbacks.insert(0 if first else 99, callback())
    training.train()
    assert (BYTES[0] in reporter.heard) is first
    assert training.state.log_history[0][BYTES[0]] > 0


def test_accelerate_knows_fewbit_not_yet_and_the_callback_says_what_to_leave_out(tmp_path: Path) -> None:
    """Once Accelerate takes any name (docs/accelerate-backend.md), the first part fails: change docs/trainers.md."""
    with pytest.raises(ValueError, match="'FEWBIT' is not a valid DynamoBackend"):
        trainer(tmp_path, torch_compile_backend="fewbit")
    os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
    with pytest.raises(ValueError, match="leave torch_compile and torch_compile_backend out"):
        trainer(tmp_path, callback(), torch_compile=True)


def test_the_callback_refuses_what_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every is 0; allowed is a whole number of steps, 1 or more"):
        callback(every=0)
    with pytest.raises(ValueError, match="unknown option 'bit'"):
        callback(bit=3)
    sharded = SimpleNamespace(torch_compile=False, fsdp="full_shard", deepspeed=None)
    callback().on_init_end(sharded, None, None)
    with pytest.raises(ValueError, match="needs all parameters on one device"):
        callback(every=1).on_init_end(sharded, None, None)


@pytest.mark.usefixtures("no_kernels")
def test_the_callback_needs_rows_by_number_to_measure(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([{"input_ids": torch.zeros(64).long(), "labels": torch.zeros(64).long()}] * 32)

    training = trainer(tmp_path, callback(every=1, loss=loss_of))
    training.train_dataset = Stream()
    with pytest.raises(ValueError, match="which an iterable dataset does not have"):
        training.train()


def test_lightnings_monitor_refuses_what_cannot_work() -> None:
    pytest.importorskip("lightning")
    from fewbit_fx.integrations.lightning import FewBitMonitor

    with pytest.raises(ValueError, match="every is 0"):
        FewBitMonitor(every=0)
    with pytest.raises(ValueError, match=r"every=\.\.\. needs loss"):
        FewBitMonitor(every=1)
    with pytest.raises(ValueError, match="needs all parameters on one device"):
        FewBitMonitor(every=1, loss=loss_of).on_train_start(SimpleNamespace(strategy="fsdp"), None)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


def test_an_example_with_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    """As a user runs it: Inductor's kernels, the printed loss and the printed bytes."""
    pytest.importorskip("accelerate")
    losses, _ = run("accelerate_loop")
    printed = capsys.readouterr().out
    with inductor_instead():
        plain_losses, _ = run("accelerate_loop")
    assert losses[0] == plain_losses[0], "bit for bit"
    report = fewbit_fx.last_report()
    assert f"loss {losses[0]:.4f} to {losses[1]:.4f}" in printed
    assert f"saved for backward: {report.fewbit_bytes:,} bytes instead of {report.plain_bytes:,}" in printed
