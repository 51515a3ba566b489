"""Caches: records beside Inductor's own, and results that live as long as their function."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fewbit_fx
from fewbit_fx import FewBitConfig
from fewbit_fx.dynamo.record_file import RecordFile
from fewbit_fx.function_cache import cached_per_function, is_weakly_referable, owner_of
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.passes.reasons import Cause, Reason
from fewbit_fx.passes.record import GraphRecord, OtherRecord, SiteRecord

REASONS = [
    None,
    *map(Reason, Cause),
    Reason.of(Cause.TOO_FEW_ELEMENTS, elements=8, min_numel=4096),
    Reason.of(Cause.ERROR_TOO_LARGE, bits=1, relative_error=1 / 3, max_relative_error=1e-9),
    Reason.of(Cause.FAULT, fault='ValueError("a \\ and a \N{SNOWMAN}")'),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inductor's cache folder."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def site(reason: Reason | None) -> SiteRecord:
    return SiteRecord(
        module="blocks.0.act",
        source_line="model.py:3",
        name="blocks.0.act.gelu",
        function="gelu",
        shape=("s0", 512),
        dtype="bfloat16",
        form="" if reason else "codes",
        bits=0 if reason else 3,
        reason=reason,
        bytes_before=4096,
        bytes_after=768,
        relative_error=0.1 + 0.2,
        levels=() if reason else (-1 / 3, 1e-300, 1.0),
        small=True,
    )


OTHER = OtherRecord("", "", ("mm", "native_layer_norm_backward"), (), "float32", 4, 4)
RECORDS = [
    GraphRecord(
        "7/1", 4100, 772, tuple(map(site, REASONS)), others=(OTHER,), pass_times=(("find", 0.25), ("gain", 0.5))
    ),
    GraphRecord("7/2", 8, 8, (), note=Reason.of(Cause.FAULT, fault="KeyError('x')"), pass_seconds=0.125),
]


def record_file(function: Callable[..., Any] = nn.Identity(), *inputs: Any, key: str = "key") -> RecordFile:  # noqa: B008
    return RecordFile(fx.symbolic_trace(function), inputs, key)


def test_records_come_back_as_they_were_under_the_id_of_the_compilation(folder: Path) -> None:
    record_file().write(RECORDS)
    found = record_file().read("7/3")
    assert found == [dataclasses.replace(record, compile_id="7/3") for record in RECORDS]
    assert [(r.pass_seconds, r.pass_times) for r in found] == [(r.pass_seconds, r.pass_times) for r in RECORDS]
    assert all(type(s.reason.cause) is Cause for s in found[0].sites if s.reason)
    hash(tuple(found))  # with tuples throughout, as reports group them


def test_real_records_come_back(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    records = list(fewbit_fx.explain(model, torch.randn(128, 32)).graphs)
    assert {bool(s.reason) for s in records[0].sites} == {True, False}
    record_file().write(records)
    assert record_file().read(records[0].compile_id) == records


def test_there_is_none_before_one_is_written(folder: Path) -> None:
    assert record_file().read("0/0") == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"5",
        b"null",
        b"[5]",
        b'["sites"]',
        b'[{"sites": []}]',
        b'[{"sites": [5], "others": [], "note": null}]',
        b'[{"sites": [], "others": ["mm"], "note": null}]',
        b'[{"sites": [], "others": [], "note": {"cause": "of another version", "details": []}}]',
        b'[{"sites": [], "others": [], "note": {"cause": "fault", "details": [1]}}]',
        b'[{"sites": [], "others": [], "note": "fault"}]',
    ],
)
def test_a_file_that_is_cut_off_or_of_another_format_gives_none(folder: Path, content: bytes) -> None:
    record_file().write(RECORDS)
    (path,) = folder.rglob("*.json")
    path.write_bytes(content)
    assert record_file().read("0/0") == []


@pytest.mark.parametrize("change", ["lacks a column", "has one more", "lacks details", "is older"])
def test_a_record_of_another_version_gives_none(folder: Path, change: str) -> None:
    record_file().write(RECORDS)
    (path,) = folder.rglob("*.json")
    data = json.loads(path.read_text())
    first, reason = data[0]["sites"][0], data[0]["sites"][1]["reason"]
    {
        "lacks a column": lambda: first.pop("name"),
        "has one more": lambda: first.update(new=1),
        "lacks details": lambda: reason.pop("details"),
        "is older": lambda: data[0].update(reason="a sentence"),
    }[change]()
    path.write_text(json.dumps(data))
    assert record_file().read("0/0") == []


def test_a_folder_that_cannot_be_written_to_is_passed_over(folder: Path) -> None:
    (folder / "fewbit").write_text("a file where the folder should be")
    record_file().write(RECORDS)
    assert record_file().read("0/0") == []


X = torch.empty(4, 6)


@pytest.mark.parametrize(
    "other",
    [
        torch.empty(6, 4),
        torch.empty(6, 4).t(),
        torch.empty(4, 6, dtype=torch.bfloat16),
        torch.empty(4, 6, device="meta"),
        torch.empty(4, 6, requires_grad=True),
        nn.Parameter(torch.empty(4, 6), requires_grad=False),
        6,
    ],
    ids=["shape", "strides", "dtype", "device", "requires_grad", "class", "a number"],
)
def test_what_is_known_of_an_input_is_in_the_key(folder: Path, other: object) -> None:
    record_file(nn.Identity(), X).write(RECORDS)
    assert record_file(nn.Identity(), other).read("0/0") == []
    assert record_file(nn.Identity(), X, X).read("0/0") == []


def test_values_of_inputs_are_not_in_the_key(folder: Path) -> None:
    record_file(nn.Identity(), torch.zeros(4, 6)).write(RECORDS)
    assert len(record_file(nn.Identity(), torch.ones(4, 6)).read("0/0")) == 2


def test_the_graph_is_in_the_key(folder: Path) -> None:
    record_file(lambda x: x.sin(), X).write(RECORDS)
    assert record_file(lambda x: x.cos(), X).read("0/0") == []
    assert len(record_file(lambda x: x.sin(), X).read("0/0")) == 2


def test_autocast_and_gradients_are_in_the_key(folder: Path) -> None:
    record_file(nn.Identity(), X).write(RECORDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert record_file(nn.Identity(), X).read("0/0") == []
    with torch.no_grad():
        assert record_file(nn.Identity(), X).read("0/0") == []


@pytest.mark.parametrize(
    "options", [{"bits": 2}, {"min_numel": 1}, {"masks": False}, {"skip": "head"}, {"disable": "gain"}], ids=str
)
def test_every_option_is_in_the_key(folder: Path, options: dict[str, Any]) -> None:
    def file_of(config: FewBitConfig, kept: tuple[int, ...] = ()) -> RecordFile:
        return record_file(nn.Identity(), X, key=FewBitPartitioner(config, print, kept).uuid())

    file_of(FewBitConfig()).write(RECORDS)
    assert len(file_of(FewBitConfig()).read("0/0")) == 2
    assert file_of(FewBitConfig().updated(options)).read("0/0") == []
    assert file_of(FewBitConfig(), kept=(0,)).read("0/0") == []


def test_another_cache_folder_has_records_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_file().write(RECORDS)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.fspath(folder / "other"))
    assert record_file().read("0/0") == []


# Results per function.


class Counting:
    """Makes a result that is never the same twice."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, function: Callable[..., Any], *key: Any) -> object:
        self.calls.append(key)
        return object()


@pytest.fixture
def made() -> Counting:
    return Counting()


@pytest.fixture
def cached(made: Counting) -> Callable[..., object]:
    def make(function: Callable[..., Any], *key: Any) -> object:
        """What is cached."""
        return made(function, *key)

    return cached_per_function(make)


class Module:
    """With two methods, equal to no other."""

    def one(self, x: Tensor) -> Tensor:
        return x

    def two(self, x: Tensor) -> Tensor:
        return x


@dataclasses.dataclass(frozen=True)
class Equal:
    """Equal to others of the same scale."""

    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale


class Slotted:
    """Cannot be referred to weakly."""

    __slots__ = ("__name__",)

    def __call__(self, x: Tensor) -> Tensor:
        return x


def test_a_result_is_made_once_per_function_and_key(made: Counting, cached: Callable[..., object]) -> None:
    assert cached(torch.sin, 3, "a") is cached(torch.sin, 3, "a")
    others = [cached(torch.sin, 3, "b"), cached(torch.sin, 2, "a"), cached(torch.cos, 3, "a"), cached(torch.sin)]
    assert len({id(result) for result in (cached(torch.sin, 3, "a"), *others)}) == 5
    assert made.calls == [(3, "a"), (3, "b"), (2, "a"), (3, "a"), ()]


def test_equal_functions_share_a_result(cached: Callable[..., object]) -> None:
    one, two, other = Equal(1.0), Equal(1.0), Equal(2.0)
    assert cached(one) is cached(two) is not cached(other)


def test_methods_are_told_apart_by_object_and_name(cached: Callable[..., object]) -> None:
    module, other = Module(), Module()
    assert cached(module.one) is cached(module.one), "a bound method is made anew at each look"
    assert len({id(cached(f)) for f in (module.one, module.two, other.one, Module.one)}) == 4


def test_a_result_goes_with_its_function() -> None:
    class Result: ...

    cached = cached_per_function(lambda function: Result())
    module = Module()
    results = [weakref.ref(cached(module.one)), weakref.ref(cached(function := lambda x: x))]
    gc.collect()
    assert all(result() for result in results), "kept as long as the function lives"
    del module, function
    gc.collect()
    assert [result() for result in results] == [None, None]


def test_what_cannot_be_referred_to_weakly_is_cached_too(made: Counting, cached: Callable[..., object]) -> None:
    function = Slotted()
    assert not is_weakly_referable(function)
    assert cached(function) is cached(function)
    assert len(made.calls) == 1


def test_a_fault_is_not_cached() -> None:
    answers: list[Any] = [ValueError("not yet"), 5]

    def make(function: Callable[..., Any]) -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    cached = cached_per_function(make)
    with pytest.raises(ValueError, match="not yet"):
        cached(torch.sin)
    assert cached(torch.sin) == 5


def test_the_owner_of_a_method_is_its_object() -> None:
    module = Module()
    assert owner_of(module.one) is module
    assert owner_of(Module.one) is Module.one
    assert owner_of(torch.sin) is torch.sin
    assert is_weakly_referable(module)
    assert not is_weakly_referable(None)
