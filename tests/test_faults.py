"""Faults of our own, one at each place: training goes on exactly, one warning names the stage, strict raises.

The graphs run in plain ATen, where the gradients of torch's own partition are the oracle, bit for bit.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import gradients
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx.dynamo.fewbit_backend import FewBitBackend
from fewbit_fx.dynamo.listener import Listener
from fewbit_fx.dynamo.record_file import RecordFile
from fewbit_fx.dynamo.records_by_model import History
from fewbit_fx.passes import pipeline
from fewbit_fx.passes.partition import Partition
from fewbit_fx.passes.pipeline import PASSES, Work
from fewbit_fx.torch_private.inductor import partition_only

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
EXACT, REPORT = "left a graph exact", "has no complete report of a graph"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 8))


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def plain_aten(gm: Any, inputs: Any, partitioner: Any, mode: Any, options: Any) -> Callable[..., Any]:
        return partition_only(gm, inputs, partitioner)

    monkeypatch.setattr("fewbit_fx.dynamo.fewbit_backend.compile_with_inductor", plain_aten)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def backend(**options: Any) -> FewBitBackend:
    return fewbit_fx.backend(min_numel=0, **options)


def train(backend: Callable[..., Any]) -> list[Tensor]:
    """The output and the gradients of one step."""
    torch.compiler.reset()
    net = model()
    output = torch.compile(net, backend=backend)(X)
    return [output.detach(), *gradients(net, output.square().sum())]


@functools.cache
def expected(coded: bool) -> list[Tensor]:
    """By torch's own partition, or by ours without a fault."""
    return train(backend(strict=True) if coded else lambda gm, inputs: partition_only(gm, inputs, None))


def same(found: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, found, others))


def ours(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if "fewbit" in str(w.message)]


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("made to fail")


def first_fail(function: Callable[..., Any]) -> Callable[..., Any]:
    return fail


def then_fail(function: Callable[..., Any]) -> Callable[..., Any]:
    """All is done, with what it changes, before the fault."""

    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        fail(list(result) if isinstance(result, Iterator) else result)

    return run


def in_the_pass(name: str, faulty: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for half in ("PLANNING", "CARRYING_OUT"):
            steps = getattr(pipeline, half)
            new = [dataclasses.replace(s, run=faulty(s.run)) if s.name == name else s for s in steps]
            monkeypatch.setattr(pipeline, half, tuple(new))

    return patch


def at(owner: Any, name: str, faulty: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, faulty(getattr(owner, name)))


def in_modules() -> dict[str, tuple[Any, str, str, str]]:
    """Places besides the passes: where, what is called there, the stage of the warning, and what it led to."""
    from fewbit_fx.dynamo import fewbit_backend, listener
    from fewbit_fx.passes import partitioner, rewrite

    choice, report = "the choice of a cut", "the report"
    return {
        "copy": (partitioner, "copy_module", "the copy of the joint graph", EXACT),
        "leaner cuts": (partitioner, "leaner_cuts", "the leaner cuts", EXACT),
        "the order of the cuts": (Work, "predicted_bytes", choice, EXACT),
        "all passes": (partitioner, "run_passes", choice, EXACT),
        "bytes": (Partition, "saved_bytes", choice, EXACT),
        "artifacts": (Listener, "observe", "the artifacts for tlparse", EXACT),
        "record": (partitioner, "graph_record", "the record", EXACT),
        "living inputs": (partitioner, "living_inputs", "the look at the joint graph's inputs", EXACT),
        "names": (partitioner, "with_original_names", "the names in the cut", EXACT),
        "copies of results": (partitioner, "keep_apart", "the copies of results and inputs", EXACT),
        "donation": (Partition, "is_donated_in_part", "the donation of saved tensors", EXACT),
        "encode and decode": (rewrite, "trace", "the pass 'rewrite'", r"left \d sites of a graph exact"),
        "inputs": (fewbit_backend, "kept_by_their_makers", "the look at Dynamo's graph", EXACT),
        "modules": (fewbit_backend, "module_paths", "the look at Dynamo's graph", EXACT),
        "sources": (partitioner, "_source_hash", "the key for torch's caches", "keeps a graph out of torch's caches"),
        "listener": (Listener, "record", report, REPORT),
        "log": (listener, "_log", report, REPORT),
        "file": (RecordFile, "__init__", "the file of the report", REPORT),
        "write": (RecordFile, "write", report, REPORT),
        "identity": (fewbit_backend, "graph_identity", report, REPORT),
        "the compiled model": (fewbit_backend, "compiled_callable", report, REPORT),
        "history": (History, "add", report, REPORT),
    }


@dataclasses.dataclass
class Place:
    """Where a fault is put.

    Attributes:
        patch: Puts it there.
        stage: What the warning calls it.
        led_to: What the warning says of the graph.
    """

    patch: Callable[[pytest.MonkeyPatch], None]
    stage: str
    led_to: str

    @property
    def coded(self) -> bool:
        """Whether the graph keeps its codes."""
        return self.led_to != EXACT and "sites" not in self.led_to


def places() -> Iterator[Any]:
    for when, faulty in (("before", first_fail), ("after", then_fail)):
        for step in PASSES:
            place = Place(in_the_pass(step.name, faulty), f"the pass {step.name!r}", EXACT)
            yield pytest.param(place, id=f"{when} {step.name}")
    for name, (owner, attribute, stage, led_to) in in_modules().items():
        yield pytest.param(Place(at(owner, attribute, first_fail), stage, led_to), id=name)
    for name in ("leaner cuts", "record", "write", "history"):
        owner, attribute, stage, led_to = in_modules()[name]
        yield pytest.param(Place(at(owner, attribute, then_fail), stage, led_to), id=f"after {name}")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("place", list(places()))
def test_training_goes_on_and_one_warning_names_the_stage(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = expected(place.coded)
    assert not same(expected(True), expected(False)), "codes show"
    place.patch(monkeypatch)
    with pytest.warns(UserWarning, match="fewbit-fx") as caught:
        found = train(backend())
    (text,) = ours(caught)
    assert re.match(f"fewbit-fx {place.led_to} after a fault of its own ", text)
    assert f"(RuntimeError('made to fail') in {place.stage})" in text
    assert "Please report it, with this message and what `python -m fewbit_fx env` prints" in text
    assert "strict=True" in text
    assert same(found, wanted)


IN_STRICT = {
    "before find",
    "encode and decode",
    "copy",
    "leaner cuts",
    "record",
    "inputs",
    "sources",
    "file",
    "listener",
}


@pytest.mark.parametrize("place", [p for p in places() if p.id in IN_STRICT | {"history"}])
def test_strict_raises_what_was_raised(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.patch(monkeypatch)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as raised:
        train(backend(strict=True))
    inner = raised.value.inner_exception
    assert type(inner) is RuntimeError
    assert inner.args == ("made to fail",)
    frames = traceback.extract_tb(inner.__traceback__)
    assert frames[-1].name == "fail", "its traceback ends where it was raised"


def raising(exception: BaseException) -> Callable[..., Any]:
    def run(*_: Any, **__: Any) -> Any:
        raise exception

    return run


@pytest.mark.parametrize(
    "fault",
    [
        RecursionError("too deep"),
        MemoryError(),
        torch.OutOfMemoryError("no memory"),
        AssertionError(),
        StopIteration(5),
        UserWarning("as if it were an error"),
        OSError(errno.ENOSPC, "full"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_every_kind_of_exception_is_a_fault(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = expected(False)
    at(pipeline.Gain, "useless", lambda _: raising(fault))(monkeypatch)
    with pytest.warns(UserWarning, match="fewbit-fx") as caught:
        found = train(backend())
    (text,) = ours(caught)
    assert f"({fault!r} in the pass 'gain')" in text
    assert same(found, wanted)


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_program_ends_it(end: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        at(pipeline.Gain, "useless", lambda _: raising(end()))(patched)
        with warnings.catch_warnings(record=True) as caught, pytest.raises(end):
            train(backend())
    assert not ours(caught)
    assert same(train(backend(strict=True)), expected(True)), "in a notebook one may go on after Ctrl-C"


@pytest.mark.parametrize("name", ["before rewrite", "encode and decode", "sources", "history"])
def test_where_warnings_are_errors_ours_is_raised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (place,) = (p.values[0] for p in places() if p.id == name)
    place.patch(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as raised:
            train(backend())
    inner = raised.value.inner_exception
    assert type(inner) is UserWarning
    assert re.match(f"fewbit-fx {place.led_to} after a fault of its own .*in {place.stage}", str(inner))


def test_a_fault_of_the_record_and_of_the_graph_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes a pass fail may make the report of the exact graph fail too."""
    wanted = expected(False)
    at(Partition, "saved", first_fail)(monkeypatch)
    mine = backend()
    with pytest.warns(UserWarning, match="fewbit-fx") as caught:
        found = train(mine)
    assert len(ours(caught)) == 1
    assert same(found, wanted)
    assert mine.last_report().graphs == ()


def test_the_report_of_a_fault_names_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_pass("represent", first_fail)(monkeypatch)
    mine = backend()
    with pytest.warns(UserWarning, match="fewbit-fx"):
        train(mine)
    assert "of a fault there: RuntimeError('made to fail') in the pass 'represent'" in str(mine.last_report())
    (graph,) = mine.last_report().graphs
    assert graph.plain_bytes == graph.fewbit_bytes > 0


def test_a_report_that_could_not_be_logged_is_there_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    good, mine = backend(strict=True), backend()
    train(good)
    at(RecordFile, "write", first_fail)(monkeypatch)
    with pytest.warns(UserWarning, match="fewbit-fx"):
        train(mine)
    assert mine.last_report().graphs == good.last_report().graphs != ()


def test_a_fault_is_of_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next graph that the same backend compiles has its codes."""
    mine = backend()
    with monkeypatch.context() as patched:
        in_the_pass("rewrite", then_fail)(patched)
        with pytest.warns(UserWarning, match="fewbit-fx"):
            train(mine)
    with warnings.catch_warnings(record=True) as caught:
        assert same(train(mine), expected(True))
    assert not ours(caught)


def test_a_graph_without_a_backward_survives_a_fault_of_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    at(RecordFile, "read", first_fail)(monkeypatch)
    torch.manual_seed(1)
    with torch.no_grad(), pytest.warns(UserWarning, match=f"fewbit-fx {REPORT}") as caught:
        found = torch.compile(net, backend=backend())(X)
    assert len(ours(caught)) == 1
    torch.manual_seed(1)
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(found, torch.compile(net, backend=lambda gm, inputs: partition_only(gm, inputs, None))(X))


def test_a_full_disk_costs_the_file_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write, mine = Path.write_text, backend(strict=True)

    def write_half(self: Path, text: str) -> int:
        write(self, text[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with warnings.catch_warnings(record=True) as caught:
        assert same(train(mine), expected(True))
    assert not ours(caught)
    assert mine.last_report().graphs
    assert list((tmp_path / "fewbit").iterdir()) == []
