"""The report: what it says of real models, and that asking for it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TransformerBlock, mlp
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx.dynamo.record_file import RecordFile
from fewbit_fx.reporting.words import action
from fewbit_fx.torch_private.inductor import partition_settings

DERIVATIVES = fewbit_fx.FewBitConfig(recipe="derivatives")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(64) for _ in range(3))
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(1)))


def test_explain_a_model() -> None:
    report = fewbit_fx.explain(Model(), torch.randn(4, 32, 64), fewbit_config=DERIVATIVES)
    gelus = [s for s in report.sites if s.function == "gelu"]
    assert sorted(s.module for s in gelus) == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(s.source_line.rsplit(":", 1)[0].endswith("helpers.py") for s in gelus)
    assert all((s.shape, s.dtype, action(s)) == ((4, 32, 256), "float32", "coded in 3 bits") for s in gelus)
    assert all(s.bytes_before == 4 * 32 * 256 * 4 and s.bytes_after == 4 * 32 * 256 * 3 // 8 for s in gelus)
    assert all(0.01 < s.relative_error < 0.1 for s in gelus)
    assert report.fewbit_bytes < report.plain_bytes
    assert report.saving == pytest.approx(1 - report.fewbit_bytes / report.plain_bytes)


def test_the_table_reads_well() -> None:
    text = str(fewbit_fx.explain(Model(), torch.randn(4, 32, 64), fewbit_config=DERIVATIVES))
    (gelu,) = (line for line in text.splitlines() if " gelu " in line)
    assert gelu.split()[:2] == ["blocks.*", "(helpers.py:" + gelu.split("helpers.py:")[1].split(")")[0] + ")"]
    assert gelu.split()[2:] == [
        "3",
        "gelu",
        "4x32x256",
        "float32",
        "coded",
        "in",
        "3",
        "bits",
        "393,216",
        "36,864",
        "6.40%",
    ]
    assert "[1] left exact, because " in text
    assert text.splitlines()[-1].startswith("bytes saved for backward: torch.compile ")
    assert max(map(len, text.splitlines())) < 160


def test_to_dict_is_json() -> None:
    report = fewbit_fx.explain(Model(), torch.randn(4, 32, 64), fewbit_config=DERIVATIVES)
    data: dict[str, Any] = json.loads(json.dumps(report.to_dict()))
    assert data["plain_bytes"] == report.plain_bytes
    assert data["graphs"][0]["sites"][0].keys() >= {"module", "function", "action", "reason", "bytes_before"}


def test_explain_leaves_the_model_and_the_random_state_alone() -> None:
    model, x = Model(), torch.randn(4, 32, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fewbit_fx.explain(model, x)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_explain_does_not_recompile_a_compiled_model() -> None:
    model, x = mlp(nn.GELU()), torch.randn(128, 32)
    compiled = torch.compile(model, backend=fewbit_fx.backend())
    compiled(x)
    torch._dynamo.utils.counters.clear()
    assert fewbit_fx.explain(compiled, x).sites[0].function == "gelu"
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count


@pytest.mark.slow
def test_explain_many_times() -> None:
    model, x = mlp(nn.GELU()), torch.randn(128, 32)
    assert {fewbit_fx.explain(model, x).fewbit_bytes for _ in range(12)} == {fewbit_fx.explain(model, x).fewbit_bytes}


def test_explain_with_other_options() -> None:
    report = fewbit_fx.explain(
        mlp(nn.GELU()), torch.randn(128, 32), fewbit_config=fewbit_fx.FewBitConfig(recipe="derivatives", bits=2)
    )
    assert action(report.sites[0]) == "coded in 2 bits"


def test_explain_a_model_with_nothing_to_code() -> None:
    report = fewbit_fx.explain(nn.Linear(32, 32), torch.randn(4, 32), fewbit_config=DERIVATIVES)
    assert report.saving == 0
    assert "no pointwise nonlinearity and no mask found" in str(report)


def test_explain_a_function_with_keywords() -> None:
    def function(x: Tensor, *, scale: float) -> Tensor:
        return torch.tanh(x * scale).sum()

    report = fewbit_fx.explain(function, torch.randn(128, 64, requires_grad=True), scale=2.0, fewbit_config=DERIVATIVES)
    assert [s.function for s in report.sites] == ["custom"]


@pytest.mark.slow
def test_last_report_of_a_model_in_training_equals_explain() -> None:
    model, x = Model(), torch.randn(4, 32, 64)
    expected = fewbit_fx.explain(model, x)
    backend = fewbit_fx.backend()
    torch.compile(model, backend=backend)(x).sum().backward()
    for report in (backend.last_report(), fewbit_fx.last_report()):
        assert report.graphs[-1].sites == expected.graphs[0].sites
        assert report.graphs[-1].fewbit_bytes == expected.fewbit_bytes


def test_a_report_survives_a_warm_start() -> None:
    """Where Inductor's caches spare the second process the compilation, the report is there all the same."""
    model, x = mlp(nn.GELU()), torch.randn(128, 32)
    reports = []
    for _ in range(2):
        torch.compiler.reset()
        backend = fewbit_fx.backend()
        torch.compile(model, backend=backend)(x).sum().backward()
        reports.append(backend.last_report())
    assert reports[0].sites == reports[1].sites != ()
    assert reports[0].rows == reports[1].rows != ()
    assert reports[0].graphs[0].pass_seconds == reports[1].graphs[0].pass_seconds > 0


def test_a_record_file_of_another_format_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    records = list(fewbit_fx.explain(mlp(nn.GELU()), torch.randn(128, 32)).graphs)
    file = RecordFile(torch.fx.symbolic_trace(nn.Identity()), [torch.randn(2)], "key")
    file.write(records)
    assert file.read(records[0].compile_id) == records
    (path,) = tmp_path.rglob("*.json")
    (data,) = json.loads(path.read_text())
    for other in ([{k: v for k, v in data.items() if k != "others"}], [{**data, "new": 1}], {"graphs": []}, 5):
        path.write_text(json.dumps(other))
        assert file.read("0/0") == []


def test_a_warm_start_tells_autocast_dtypes_apart() -> None:
    settings = set()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            settings.add(partition_settings())
    assert len(settings) == 2


def test_the_sites_of_a_report_say_in_words_what_the_records_have_as_data() -> None:
    report = fewbit_fx.explain(
        mlp(nn.GELU()), torch.randn(256, 32), fewbit_config=fewbit_fx.FewBitConfig(recipe="derivatives", min_numel=0)
    )
    (record,), (site,) = report.graphs[0].sites, report.sites
    assert (site.action, site.reason, site.cause) == ("coded in 3 bits", "", "")
    assert (record.form, record.bits, record.reason) == ("codes", 3, None)
    off = fewbit_fx.FewBitConfig(recipe="derivatives", min_numel=0, derivatives=False)
    report = fewbit_fx.explain(mlp(nn.GELU()), torch.randn(256, 32), fewbit_config=off)
    (record,), (site,) = report.graphs[0].sites, report.sites
    assert site.is_exact
    assert site.action == "left exact"
    assert site.reason == "derivatives are switched off (derivatives=False)"
    assert site.cause == "switched off" == record.reason.cause.value  # type: ignore[union-attr]
