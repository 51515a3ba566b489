"""``python -m bench evidence``: its methods, cases, tables and plots, and a quick run of the whole."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.architectures import Example
from bench.evidence import cases as evidence_cases
from bench.evidence import codebooks, codebooks_table, command, largest_batch, memory, memory_plot, memory_table, peak
from bench.evidence.cases import Case, Store, failure, run
from bench.evidence.first_gradient import FirstGradient
from bench.evidence.frontier import NOISE, Point, frontier, points
from bench.evidence.methods import METHODS, OF_CONVERGENCE, OF_MEMORY, REFERENCE, Method, blocks
from bench.evidence.models import MODELS, QUICK, built, model_named
from bench.evidence.piecewise import RELU_SUMS, paper_levels
from bench.evidence.turns import alone, preparing, turns_for_all
from bench.machine import CHECKOUT
from fewbit_fx.codebooks.activations import ACTIVATIONS, derivative_of

ABOUT = {"device": "AMD EPYC, 2 cores", "torch": "2.13.0", "date": "2026-11-26", "commit": "abc1234", "settings": ""}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.activation, self.down = nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.activation(self.up(x)))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def example() -> Example:
    torch.manual_seed(0)
    return Example(Tower().bfloat16(), {"x": torch.randn(64, 64).bfloat16()}, lambda loss: loss)


# Methods


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.is_exact])
def test_exact_methods_say_so(name: str) -> None:
    assert FirstGradient(example, 0).of(METHODS[name]) is None
    assert name in ("eager", "inductor", "budget 0.9", "budget 0.5", "checkpoint", "exact")


def test_errors_of_gradients_are_as_their_bits() -> None:
    names = "fp8 e5m2", "fp8 e4m3fn", "derivatives, 1 bit", "derivatives, 3 bits", "default"
    first = FirstGradient(example, 0)
    errors = {name: first.of(METHODS[name]) for name in names}
    assert errors["fp8 e5m2"] > errors["fp8 e4m3fn"] > errors["default"] > 0  # type: ignore[operator]
    assert errors["derivatives, 1 bit"] > errors["derivatives, 3 bits"] > 0  # type: ignore[operator]


def test_models_that_share_parameters_have_the_same_error() -> None:
    """Their modules are their own: drop-ins and checkpoints change them."""
    shared, method = example(), METHODS["default"]
    first = FirstGradient(lambda: memory.sharing_parameters(shared), 0)
    assert first.of(method) == FirstGradient(example, 0).of(method)
    assert all(parameter.grad is None for parameter in shared.model.parameters())
    METHODS["drop-ins, 3 bits"].applied(memory.sharing_parameters(shared).model)
    assert isinstance(shared.model.layers[0].activation, nn.GELU)  # type: ignore[index,union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drop-ins, 3 bits", "fp8 e4m3fn", "checkpoint", "budget 0.9", "default, budget 0.9"])
def test_methods_change_the_gradient_by_their_error_alone(name: str) -> None:
    method, exact, coded = METHODS[name], example(), example()
    exact.loss(exact.model(**exact.inputs)).backward()
    torch.compiler.reset()
    loss = coded.loss(method.applied(coded.model)(**coded.inputs))
    loss.backward()
    for (_, a), (_, b) in zip(exact.model.named_parameters(), coded.model.named_parameters(), strict=True):
        assert b.grad is not None
        assert float((a.grad - b.grad).norm() / a.grad.norm()) < 0.1  # type: ignore[operator,union-attr]


def test_blocks_are_the_members_of_outermost_lists() -> None:
    model = nn.ModuleDict(
        {"encoder": nn.Sequential(nn.ModuleList([nn.ModuleList([Block()]), Block()])), "head": Block()}
    )
    outermost = model["encoder"][0]  # type: ignore[index]
    assert list(blocks(model)) == [outermost[0], outermost[1]]


@pytest.mark.parametrize(("name", "calls"), [("checkpoint", 2), ("inductor", 1)])
def test_checkpointed_blocks_are_computed_again(name: str, calls: int) -> None:
    made, seen = example(), []
    METHODS[name].applied(made.model)  # not called: nothing is compiled
    made.model.layers[0].up.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr,index]
    made.model(**made.inputs).backward()
    assert len(seen) == calls


def test_lists_of_methods() -> None:
    assert REFERENCE in OF_MEMORY
    assert REFERENCE in OF_CONVERGENCE
    assert set(OF_MEMORY) | set(OF_CONVERGENCE) == set(METHODS)


# Models


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("SD3", "diffusion U-Net")])
def test_models_are_built_small(name: str) -> None:
    made = built(name, QUICK, torch.bfloat16, torch.device("cpu"), seed=0)
    loss = made.loss(made.model(**made.inputs))
    assert math.isfinite(float(loss.detach()))
    assert not any(m.p for m in made.model.modules() if isinstance(m, nn.Dropout))


def test_a_model_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="'Lama'; allowed is RoBERTa, GPT-2"):
        model_named("Lama")


# Cases


def test_a_case_has_a_file_of_its_own() -> None:
    cases = [memory.case(model, method, QUICK, "bfloat16", "cpu", 1.0) for model in MODELS for method in METHODS]
    assert len({case.file for case in cases}) == len(cases)
    assert Case("memory", "Llama-3, LoRA on attention, default, budget 0.9", {}).file == (
        "memory/llama-3_lora-on-attention_default_budget-0.9.json"
    )


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, measured = Store(tmp_path), []

    def measure(cases: Sequence[Case], environment: Mapping[str, str]) -> list[Any]:
        (case,) = cases
        measured.append(case.name)
        if case.name == "b":
            raise RuntimeError("failed:\nTraceback\nValueError: no")
        return [{"found": case.name}]

    monkeypatch.setattr(evidence_cases, "measured", measure)
    cases = [Case("part", name, {"size": 1}) for name in "abc"]
    shown: list[tuple[str, int]] = []
    failures = run(cases, store, ABOUT, 1, {}, lambda name, done: shown.append((name, done)))
    assert failures == ["part, b: ValueError: no"]
    assert shown == [("", 0), ("a", 1), ("b", 2), ("c", 3)]
    run(cases, store, ABOUT, 1, {}, lambda name, done: None)
    run([Case("part", "a", {"size": 2})], store, ABOUT, 1, {}, lambda name, done: None)
    assert measured == ["a", "b", "c", "b", "a"]  # what failed, and what has other settings
    a, _ = store.files("part")
    assert a.data == {"name": "a", "settings": {"size": 2}, "conditions": ABOUT, "result": {"found": "a"}}
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == ["a.json", "c.json"]


def test_cases_of_one_process_are_measured_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is left out, and one that fails costs no other."""
    store, processes = Store(tmp_path), []

    def measure(cases: Sequence[Case], environment: Mapping[str, str]) -> list[Any]:
        processes.append([case.name for case in cases])
        return [failure(ValueError("no")) if case.name == "b" else {"found": case.name} for case in cases]

    monkeypatch.setattr(evidence_cases, "measured", measure)
    cases = [Case("part", name, {}, process) for name, process in [("a", "x"), ("b", "x"), ("c", "y"), ("d", None)]]
    for _ in range(2):
        assert run(cases, store, ABOUT, 1, {}, lambda name, done: None) == ["part, b: no"]
    assert processes == [["a", "b"], ["c"], ["d"], ["b"]]


@pytest.mark.slow
def test_methods_take_turns_in_one_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where one that fails costs no other."""
    methods = "inductor", "checkpoint", "exact"
    cases = [memory.case("Llama-3", method, QUICK, "bfloat16", "cpu", 0.01).settings for method in methods]
    applied = Method.applied

    def refuse(method: Method, model: nn.Module) -> nn.Module:
        if method.name == "checkpoint":
            raise RuntimeError("no")
        return applied(method, model)

    monkeypatch.setattr(memory, "example_of", lambda settings: example())
    monkeypatch.setattr(Method, "applied", refuse)
    memory.main([json.dumps(settings) for settings in cases])
    plain, failed, exact = json.loads(capsys.readouterr().out)
    assert failed == {"failed": "no"}
    assert plain["timing"]["ratio"] == 1
    assert 0 < exact["memory"]["held_bytes"] <= plain["memory"]["held_bytes"]
    assert exact["memory"]["peak_bytes"] > 0


@pytest.mark.skipif(os.name != "posix", reason="file locks are of POSIX")
def test_times_are_taken_when_nobody_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ready, go = threading.Event(), threading.Event()

    def prepare() -> None:
        with preparing():
            ready.set()
            go.wait(10)
            order.append("prepared")

    with turns_for_all() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        other = threading.Thread(target=prepare)
        other.start()
        ready.wait(10)
        with preparing():
            order.append("beside")
        threading.Timer(0.1, go.set).start()
        with alone():
            order.append("timed")
        other.join()
    assert order == ["beside", "prepared", "timed"]


def test_one_process_has_nothing_to_wait_for() -> None:
    with preparing(), alone(), alone():
        pass


# The largest batch


@pytest.mark.parametrize(("fixed", "each"), [(1, 1), (50, 3), (0, 7), (90, 1)])
def test_the_largest_batch_is_found_to_two_hundredths(fixed: int, each: int) -> None:
    limit, tried = 1000, []

    def peak_of(batch: int) -> int | None:
        tried.append(batch)
        peak = fixed + each * batch + batch % 3
        return peak if peak <= limit else None

    batch, peak = largest_batch.largest(peak_of, limit, 4)
    assert len(tried) <= 8
    assert peak == peak_of(batch)
    assert peak_of(batch + max(1, round(0.02 * batch))) is None


def test_what_does_not_fit_at_all_is_told() -> None:
    with pytest.raises(MemoryError, match="a batch of 8 does not fit into 10 bytes"):
        largest_batch.largest(lambda batch: batch if batch < 8 else None, 10, 4)


def test_the_table_of_the_largest_batch(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for method, batch in (("inductor", 10), ("lean", 25)):
        case = largest_batch.case("Llama-3", method, QUICK, "bfloat16")
        store.put(case, {"batch": batch, "peak_bytes": 1}, ABOUT)
    lines = list(largest_batch.lines(store.files("largest_batch")))
    assert lines[0] == "| largest batch in 6 GiB | inductor | lean |"
    assert lines[2] == "| Llama-3 | 10 | 25 (x 2.50) |"


# Tables and plots


def point(method: str, held: float, time: float = 1.0, error: float = 0.0) -> Point:
    return Point("Llama-3", method, int(held * 2**20), held, time, error)


def test_the_frontier() -> None:
    plain, budget, lean = point("inductor", 1), point("budget 0.9", 0.7, 1 + NOISE / 2), point("lean", 0.4, 1.0, 0.01)
    worse, slow = point("fp8 e5m2", 0.5, 1.0, 0.04), point("checkpoint", 0.1, 1.3)
    assert frontier([plain, budget, lean, worse, slow]) == [budget, lean, slow]
    assert lean.is_ours
    assert not slow.is_ours


def write(folder: Path, method: str, held: float, time: float, error: float | None, model: str = "Llama-3") -> None:
    case = memory.case(model, method, QUICK, "bfloat16", "cpu", 1.0)
    timing = {
        "name": method,
        "calls": 1,
        "rounds": 5,
        "median_s": time,
        "lower_s": time,
        "upper_s": time,
        "ratio": time,
    }
    result = {
        "memory": {"held_bytes": int(held * 2**20), "peak_bytes": int(held * 2**21)},
        "timing": timing,
        "gradient_error": error,
    }
    Store(folder).put(case, result, ABOUT)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    write(tmp_path, "inductor", 4, 1.0, None)
    write(tmp_path, "budget 0.9", 3, 1.0, None)
    write(tmp_path, "default", 2, 1.01, 0.005)
    write(tmp_path, "derivatives, 3 bits", 4, 1.2, 0.015)
    write(tmp_path, "checkpoint", 1, 1.4, None)
    return tmp_path


def test_points_are_against_the_reference(measured: Path) -> None:
    found = {p.method: p for p in points(Store(measured).files("memory"))["Llama-3"]}
    assert (found["default"].held, found["default"].time, found["default"].error) == (0.5, 1.01, 0.005)
    assert found["checkpoint"].error == 0


def test_the_table_of_memory(measured: Path) -> None:
    lines = list(memory_table.lines(Store(measured).files("memory")))
    assert (
        lines[0] == "| bytes held, time, error | inductor | budget 0.9 | checkpoint | derivatives, 3 bits | default |"
    )
    ours = "*+0 %, x 1.20 (1.5 %)* | -50 %, x 1.01 (0.5 %)"
    assert lines[2] == f"| Llama-3 | 4.0 MiB | -25 %, x 1.00 | -75 %, x 1.40 | {ours} |"
    assert "widths divided by 4" in lines[-1]


def test_the_peak_of_a_step() -> None:
    eager = peak.case("GPT-2", "eager", QUICK, "bfloat16", "cpu").settings
    (found,) = peak.measure([dict(eager)])
    assert found["peak_bytes"] >= found["held_bytes"] > 0


def test_a_quick_run_shares_processes() -> None:
    parts = command.cases_of(command._parser().parse_args(["--quick"]))
    assert {part: len({case.process for case in cases}) for part, cases in parts.items() if len(cases) > 1} == {
        "memory": 1,
        "convergence": 1,
    }
    assert not parts["peak"]


def test_the_table_of_peaks(tmp_path: Path) -> None:
    for method, peak_mib, held_mib in (("inductor", 8, 4), ("lean", 5, 1)):
        case = peak.case("Llama-3", method, peak.larger(QUICK), "bfloat16", "cpu")
        Store(tmp_path).put(case, {"peak_bytes": peak_mib * 2**20, "held_bytes": held_mib * 2**20}, ABOUT)
    lines = list(peak.lines(Store(tmp_path).files("peak")))
    assert lines[2] == "| Llama-3 | 8.0 MiB (4.0 MiB) | -38 % (-75 %) |"
    assert "2 layers of widths divided by 4, batch 4, 128 tokens" in lines[-1]


def test_methods_that_few_models_are_measured_with_have_a_table(measured: Path) -> None:
    files = Store(measured).files("memory")
    assert list(memory_table.all_lines(files))[:1] == ["| bytes held, time, error |"]
    for model in ("GPT-2", "ViT"):
        write(measured, "inductor", 4, 1.0, None, model)
        write(measured, "default", 2, 1.0, 0.01, model)
    files = Store(measured).files("memory")
    assert next(iter(memory_table.lines(files))) == "| bytes held, time, error | inductor | default |"
    lines = list(memory_table.all_lines(files))
    assert lines[0] == "| bytes held, time, error | Llama-3 |"
    assert "| derivatives, 3 bits | *+0 %, x 1.20 (1.5 %)* |" in lines


def test_the_best_of_each(measured: Path) -> None:
    files = Store(measured).files("memory")
    row = list(memory_table.best_lines(files))[2]
    assert row == (
        "| Llama-3 | budget 0.9: -25 %, x 1.00 | default: -50 %, x 1.01 (0.5 %) | default: -50 %, x 1.01 (0.5 %) "
        "| checkpoint: -75 %, x 1.40 | checkpoint: -75 %, x 1.40 |"
    )
    assert list(memory_table.verdict(files)) == ["- Llama-3: `derivatives, 3 bits` by `budget 0.9`."]


def test_a_gradient_that_is_not_finite_wins_nothing(measured: Path) -> None:
    write(measured, "fp8 e5m2", 0.5, 0.9, float("nan"))
    files = Store(measured).files("memory")
    (of_model,) = points(files).values()
    assert "fp8 e5m2" not in {p.method for p in frontier(of_model)}
    assert "| *-88 %, x 0.90 (not finite)* |" in list(memory_table.lines(files))[2]
    assert not any("fp8" in line for line in (*memory_table.best_lines(files), *memory_table.verdict(files)))


def test_the_plot_of_memory(measured: Path) -> None:
    memory_plot.save_plot(measured / "memory.png", Store(measured).files("memory"))
    assert (measured / "memory.png").read_bytes().startswith(b"\x89PNG")


# Codebooks


def test_the_papers_levels_are_those_that_its_library_ships() -> None:
    """Theirs of GELU in 2 bits, to within the grid: borders are 0.006 apart at most, levels follow."""
    found = paper_levels("gelu", 2)
    assert found.borders == pytest.approx((-0.453594, 0.00001, 0.453608), abs=0.006)
    assert found.levels == pytest.approx((-0.00148, 0.32506, 0.67495, 1.00148), abs=0.003)


@pytest.mark.parametrize("function", RELU_SUMS)
def test_sums_of_relus_are_the_function_far_away(function: str) -> None:
    """Slopes add up to 1 and the lines to no offset, as the paper's constraints have it."""
    pieces = RELU_SUMS[function]
    rises = [b - a for a, b in zip(pieces.levels, pieces.levels[1:], strict=False)]
    assert sum(rises) == pytest.approx(1)
    assert sum(rise * border for rise, border in zip(rises, pieces.borders, strict=True)) == pytest.approx(0, abs=1e-6)
    assert pieces(derivative_of(ACTIVATIONS[function])(torch.zeros(1).numpy()) - 9)[0] == 0


def test_the_table_of_codebooks(tmp_path: Path) -> None:
    errors = [0.1] * len(codebooks.SPREADS)
    rows = [
        {"function": "silu", "levels": "sampled", "bits": 2, "errors": [0.05, *errors[1:]]},
        {"function": "silu", "levels": "the paper's", "bits": 2, "errors": errors},
    ]
    store = Store(tmp_path)
    store.put(codebooks.case(), rows, ABOUT)
    lines = list(codebooks_table.lines(store.files("codebooks")))
    assert lines[2].startswith("| SiLU, 2 bits | sampled | **5.0 %** | **10.0 %** |")
    assert lines[3].startswith("| SiLU, 2 bits | the paper's | 10.0 % | **10.0 %** |")


# The command


def test_the_full_run_has_all_cases() -> None:
    flags = command._parser().parse_args([])
    cases = command.cases_of(flags)
    assert len(cases["memory"]) == len(MODELS) * len(OF_MEMORY)
    assert {case.settings["seed"] for case in cases["convergence"]} == {0, 1, 2}


def test_render_alone_measures_nothing(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_cases, "measured", lambda *_: pytest.fail("measured"))
    command.main(["--render", "--output", str(measured)])
    assert "## Memory and time" in (measured / "tables.md").read_text()


@pytest.mark.parametrize(
    "flags",
    ["--parts codebooks memory --methods inductor lean --dtype float32", pytest.param("", marks=pytest.mark.slow)],
)
def test_a_quick_run(flags: str, tmp_path: Path) -> None:
    """The whole command, as users call it."""
    folder = tmp_path / "quick"
    line = [sys.executable, "-m", "bench", "evidence", "--quick", "--seconds", "0.1", "--output", str(folder)]
    line += flags.split()
    done = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (folder / "tables.md").read_text()
    assert "## Codebooks" in page
    assert "## Memory and time" in page
    assert ("## Convergence" in page) == (not flags)
    found = {p.method: p for p in points(Store(folder).files("memory"))["Llama-3"]}
    held = [found[name].held for name in ("lean", "default", "budget 0.9", "inductor") if name in found]
    assert len(held) == (2 if flags else 4)
    assert held == sorted(set(held)), "each less than the next"
    assert found["lean"].error > (0 if flags else found["default"].error)
    (levels,) = Store(folder).files("codebooks")
    rows = {(row["function"], row["levels"]): row["errors"] for row in levels.data["result"]}
    for function in codebooks.FUNCTIONS:
        ours = rows[function, codebooks.OURS]
        assert ours[0] < rows[function, codebooks.PAPER][0]  # of narrow x, which fixed levels cannot follow
        assert all(a < b for a, b in zip(ours, rows[function, codebooks.RELUS], strict=True))
    assert all(json.loads(path.read_text())["conditions"]["torch"] for path in folder.rglob("*.json"))
