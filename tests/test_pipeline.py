"""The passes one by one: what each adds, its time, and what happens where it is switched off."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import check_interface, mlp, watch
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx import FewBitConfig
from fewbit_fx.passes.pipeline import PASSES
from fewbit_fx.passes.rewrite import PREFIX
from fewbit_fx.reporting.words import because

NAMES = [step.name for step in PASSES]


def config(**options: object) -> FewBitConfig:
    return FewBitConfig(recipe="derivatives", strict=True, min_numel=0).updated(options)


def test_the_order_is_stated_once() -> None:
    assert NAMES == ["find", "represent", "gain", "protect", "rewrite", "compare"]


def test_each_pass_is_timed() -> None:
    record = watch(mlp(nn.GELU(), frozen=True), torch.randn(64, 32)).record
    assert [name for name, _ in record.pass_times] == NAMES
    assert 0 < sum(seconds for _, seconds in record.pass_times) <= record.pass_seconds


def test_times_are_in_the_compile_profile_of_torch() -> None:
    from torch._dynamo.utils import compile_times

    watch(mlp(nn.GELU(), frozen=True), torch.randn(64, 32))
    profile = compile_times(repr="str")
    assert all(f"fewbit_fx.{name}" in profile for name in NAMES)


@pytest.mark.parametrize("name", ["represent", "rewrite"])
def test_without_choosing_or_rewriting_all_is_exact(name: str) -> None:
    model, x = mlp(nn.GELU(), frozen=True), torch.randn(64, 32)
    seen = watch(model, x, config=config(disable=name))
    assert {because(s.reason) for s in seen.record.sites} == {f"the option disable has {name!r}"}
    assert seen.record.fewbit_bytes == seen.record.plain_bytes
    assert seen.chosen.forward.code == seen.plain.forward.code


def test_without_finding_there_are_no_sites() -> None:
    seen = watch(mlp(nn.GELU(), frozen=True), torch.randn(64, 32), config=config(disable=["find"]))
    assert seen.record.sites == ()
    assert seen.record.fewbit_bytes == seen.record.plain_bytes


def needed_anyway(x: Tensor, w: Tensor) -> Tensor:
    """The matrix product saves x, from which the derivative follows."""
    return x @ w + F.gelu(x) @ w


def test_without_gain_and_compare_even_useless_codes_are_put_in() -> None:
    x, w = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    assert not watch(needed_anyway, x, w, config=config()).coded
    assert not watch(needed_anyway, x, w, config=config(disable="gain")).coded  # compare takes them back
    seen = watch(needed_anyway, x, w, config=config(disable=("gain", "compare")))
    assert len(seen.coded) == 1
    check_interface(seen.chosen)
    assert seen.record.fewbit_bytes > seen.record.plain_bytes
    assert any(PREFIX in n.name for n in seen.chosen.saved())


@pytest.mark.parametrize("make", [lambda: fewbit_fx.backend(disable="gains"), lambda: watch_with("gains")])
def test_a_pass_that_does_not_exist(make: object) -> None:
    with pytest.raises(Exception, match=r"'disable' has 'gains'; allowed are the passes find, represent, gain"):
        make()  # type: ignore[operator]


def watch_with(name: str) -> object:
    return watch(mlp(nn.GELU()), torch.randn(64, 32), config=config(disable=name))


def test_planes_carry_the_name_of_their_site() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    seen = watch(model.requires_grad_(False), torch.randn(64, 32, requires_grad=True), config=config(bits=1))
    assert [s.name for s in seen.record.sites] == ["3.gelu", "1.gelu"]  # as the backward meets them
    planes = [n.name for n in seen.chosen.saved() if n.name.startswith(PREFIX)]
    assert sorted(planes) == [f"{PREFIX}_0_3_gelu", f"{PREFIX}_1_1_gelu"]


def test_equal_names_are_numbered_and_skip_knows_them() -> None:
    def twice(x: Tensor, w: Tensor) -> Tensor:
        return F.gelu(F.gelu(x @ w) @ w) @ w

    w, x = torch.randn(64, 64), torch.randn(64, 64, requires_grad=True)
    names = [s.name for s in watch(twice, x, w, config=config()).coded]
    assert sorted(names) == ["gelu", "gelu#2"]
    assert [s.name for s in watch(twice, x, w, config=config(skip="gelu#2")).coded] == ["gelu"]


def test_artifacts_for_tlparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TORCH_TRACE is read when torch is imported, so that the handler is put on the trace's logger here."""
    log = tmp_path / "trace.log"
    handler = logging.FileHandler(log)
    from torch._logging._internal import TorchLogsFormatter, trace_log

    handler.setFormatter(TorchLogsFormatter(trace=True))
    monkeypatch.setattr(trace_log, "handlers", [handler])
    monkeypatch.setattr(trace_log, "propagate", False)
    level = trace_log.level
    trace_log.setLevel(logging.DEBUG)
    try:
        torch.compiler.reset()
        fewbit_fx.explain(mlp(nn.GELU(), frozen=True), torch.randn(64, 32), fewbit_config=config())
    finally:
        trace_log.setLevel(level)
        handler.close()
    text = log.read_text()
    found = [json.loads(line[line.index("{") :]) for line in text.splitlines() if '"artifact"' in line]
    names = [entry["artifact"]["name"] for entry in found if "fewbit" in entry["artifact"]["name"]]
    graphs = ["fewbit_forward_before", "fewbit_backward_before", "fewbit_forward_after", "fewbit_backward_after"]
    assert names == [*graphs, "fewbit_report"]
    assert "fewbit_plane_0_1_gelu" in text
    assert "coded in 3 bits" in text
