"""The benchmark commands: what they compare and count; never how long anything takes."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit_fx
from bench import bias, block, comparison, compile_time, convergence, demo, measure, operator, saved, step
from bench.architectures import Architecture, Example
from bench.backends import BACKENDS, BUDGETED, FEWBIT, INDUCTOR, backend_of, saved_bytes_within_budget
from bench.compile_time import Compilation
from bench.language_models import LANGUAGE_MODELS, language_model
from bench.measure import Memory, in_fresh_process, what_happened
from bench.timing import MIN_ROUNDS, compare, timings_of
from bench.training import Batch, Runner
from fewbit_fx import FewBitConfig
from fewbit_fx.reporting.words import action

COMMANDS = (demo, operator, block, step, compile_time, convergence, bias, saved)
MAINS = {command.__name__.removeprefix("bench."): command.main for command in COMMANDS}


class FakeClock:
    """Each candidate's call takes its given seconds, times a factor that changes from turn to turn."""

    def __init__(self, seconds: dict[str, float], drift: float = 1.0) -> None:
        self.seconds = seconds
        self.drift = drift
        self.turns: list[tuple[str, int]] = []

    def __call__(self, function: Callable[[], object], calls: int) -> float:
        name = str(function())
        self.turns.append((name, calls))
        return calls * self.seconds[name] * self.drift ** len(self.turns)


def candidates(names: str) -> dict[str, Callable[[], object]]:
    return {name: lambda name=name: name for name in names}


def test_candidates_take_turns_in_rotating_order() -> None:
    clock = FakeClock({"a": 1.0, "b": 1.0, "c": 1.0})
    compare(candidates("abc"), clock=clock, seconds=1.0)
    rounds = [name for name, _ in clock.turns[3:]]  # three turns to find the number of calls
    assert "".join(rounds) == "abcbcacababcbca"


def test_a_turn_has_the_calls_that_it_needs() -> None:
    timings = compare(candidates("ab"), clock=FakeClock({"a": 0.001, "b": 5.0}), seconds=1.0, turn=0.02)
    assert {name: timing.calls for name, timing in timings.items()} == {"a": 32, "b": 1}


def test_medians_quartiles_and_ratio_are_per_call() -> None:
    timings = compare(candidates("ab"), clock=FakeClock({"a": 0.25, "b": 0.5}), seconds=6.0)
    assert timings["b"].median_s == timings["b"].lower_s == timings["b"].upper_s == 0.5
    assert timings["b"].ratio == 2.0
    assert timings["a"].ratio == 1.0
    assert timings["a"].rounds == 8, "as many as take the seconds asked for"
    assert timings["a"].spread == 0.0


def test_a_slow_candidate_has_the_least_number_of_rounds() -> None:
    assert compare(candidates("a"), clock=FakeClock({"a": 9.0}), seconds=1.0)["a"].rounds == MIN_ROUNDS


def test_the_ratio_survives_a_machine_that_slows_down() -> None:
    """Turns of one round are neighbours: a drift of 1 % a turn moves the medians, not the ratio."""
    timings = compare(candidates("ab"), clock=FakeClock({"a": 1.0, "b": 1.5}, drift=1.01), seconds=500.0)
    assert timings["b"].ratio == pytest.approx(1.5, rel=0.011)
    assert timings["b"].spread > 0.1


def test_times_taken_elsewhere_are_compared_round_by_round() -> None:
    timings = timings_of({"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]})
    assert (timings["b"].median_s, timings["b"].ratio) == (2.0, 1.0)
    assert (timings["b"].calls, timings["b"].rounds) == (1, 3)


def test_cells_stand_beside_the_first() -> None:
    assert comparison.changes([2.0, 1.0, None], str) == ["2.0", "1.0 (-50.00%)", "-"]
    assert comparison.ratios([2.0, 4.0, 1.0], str) == ["2.0", "4.0 (x 2.00)", "1.0 (x 0.50)"]
    assert comparison.changes([None, 1.0], str) == ["-", "1.0"], "nothing to compare with yet"


def test_progress_goes_from_nothing_to_all() -> None:
    shares: list[float] = []
    compare(candidates("a"), clock=FakeClock({"a": 1.0}), seconds=8.0, advance=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) == 8


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("demo", "--bits 9", "allowed is a whole number from 1 to 8"),
        ("demo", "--steps 0", "a whole number, at least 1"),
        ("operator", "--bits 9", "allowed is a whole number from 1 to 8"),
        ("operator", "--sizes 1000", "a multiple of 1024 elements"),
        ("operator", "--sizes 2**x", "a multiple of 1024 elements"),
        ("operator", "--functions gelu relu", "invalid choice"),
        ("operator", "--seconds 0", "a number of seconds above 0"),
        ("operator", "--seconds soon", "a number of seconds above 0"),
        ("operator", "--output no/such/folder/operator", "there is no folder 'no/such/folder'"),
        ("operator", "--device tpu", "allowed is cpu or cuda"),
        ("block", "--width 100", "a multiple of 64"),
        ("block", "--batches 0", "a whole number, at least 1"),
        ("demo", "--model vit", "invalid choice"),
        ("demo", "--recipe leanest", "invalid choice"),
        ("demo", "--seed -1", "a whole number, 0 or more"),
        ("step", "--model roberta --lora", "--lora is of the model gpt or llama"),
        ("step", "--model vit --sequence 16", "an image of vit has 257 tokens"),
        ("step", "--model roberta --sequence 511", "at most 510 tokens"),
        ("compile_time", "--width 66", "a multiple of the 4 heads"),
        ("compile_time", "--repeats -1", "a whole number, at least 1"),
    ],
)
def test_wrong_flags_fail_at_once(command: str, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        MAINS[command](flags.split())
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def run(command: str, flags: str, folder: Path) -> dict[str, Any]:
    output = folder / command
    MAINS[command]([*flags.split(), "--output", str(output)])
    data: dict[str, Any] = json.loads(output.with_suffix(".json").read_text())
    assert data["command"] == f"python -m bench.{command} {flags} --output {output}".replace("2**13", "'2**13'")
    assert data["conditions"].keys() >= {"commit", "device", "torch", "triton", "numpy", "python", "date", "settings"}
    return data


def in_this_process(module: str, flags: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """In place of bench.measure.in_fresh_process, which takes seconds to import torch and to warm up."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        MAINS[module.removeprefix("bench.")](flags)
    return json.loads(printed.getvalue().splitlines()[-1])


def test_a_fresh_process_hands_back_the_json_that_it_prints(tmp_path: Path) -> None:
    file = tmp_path / "value.json"
    file.write_text('{"peak": 1}')
    assert in_fresh_process("json.tool", ["--compact", str(file)]) == {"peak": 1}
    with pytest.raises(RuntimeError, match="unrecognized arguments: --peak"):
        in_fresh_process("json.tool", ["--peak"])


@pytest.mark.slow
def test_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "keep_freed_memory", lambda: False)  # it would stay so for other tests
    flags = "--functions gelu relu+dropout --dtypes bfloat16 --sizes 2**13 --bits 3 --seconds 0.01"
    n = 2**13
    gelu, sampled_gelu, coded_gelu, dropout, coded_dropout = run("operator", flags, tmp_path)["rows"]
    assert (sampled_gelu["levels"], coded_gelu["levels"]) == ("sampled", "typical")
    assert sampled_gelu["saved_bytes"] == n * 3 // 8 + 16
    assert (gelu["backend"], gelu["bits"], gelu["saved"], gelu["saved_bytes"]) == ("inductor", None, ["x"], 2 * n)
    assert coded_gelu["saved"] == ["gelu: coded in 3 bits"]
    assert coded_gelu["saved_bytes"] == n * 3 // 8
    assert (dropout["saved"], dropout["saved_bytes"]) == (["masks"], 2 * n)
    assert coded_dropout["saved"] == ["dropout: exact one-bit mask", "relu: exact one-bit mask"]
    assert coded_dropout["saved_bytes"] == n // 4
    moved = {
        row["operator"] + row["backend"]: [row[phase]["moved_bytes"] / n for phase in operator.PHASES]
        for row in (gelu, coded_gelu, dropout, coded_dropout)
    }
    assert moved == {
        "geluinductor": [4, 6, 10],
        "gelufewbit": [4.375, 4.375, 8.75],
        "relu+dropoutinductor": [6, 6, 12],
        "relu+dropoutfewbit": [4.25, 4.25, 8.5],
    }
    assert gelu["forward"]["timing"]["ratio"] == 1.0
    assert coded_gelu["backward"]["copy_s"] > 0


def test_tanh_saves_its_output() -> None:
    x, gradient = (torch.randn(8, 1024) for _ in range(2))
    tanh = operator.OPERATORS["tanh"]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = operator.Compiled(tanh.function, "inductor", x.requires_grad_(), gradient).forward()
    assert tanh.saves == "y"
    assert torch.equal(saved[-1], y)


def test_block(tmp_path: Path) -> None:
    flags = "--blocks mlp --training frozen --dtypes bfloat16 --width 64 --context 64 --batches 2 --seconds 0.01"
    plain, coded = run("block", flags, tmp_path)["rows"]
    inner = 2 * 64 * 4 * 64  # elements of the GELU's input
    assert (plain["backend"], plain["saved_bytes"], plain["sites"]) == ("inductor", 2 * inner, [])
    assert (coded["backend"], coded["saved_bytes"]) == ("fewbit", inner * 3 // 8)
    assert coded["sites"] == ["gelu: coded in 3 bits"]


@pytest.mark.parametrize("training", block.TRAINING)
def test_a_transformer_block_saves_a_code_and_two_masks(training: str) -> None:
    tokens, width = 2 * 64, 64
    module = block.Case("transformer", training, "bfloat16", 2, 64, width).module()
    x = torch.randn(2, 64, width, dtype=torch.bfloat16, requires_grad=True)
    report = fewbit_fx.explain(module, x, fewbit_config=FewBitConfig(recipe="derivatives"))
    inner, masks = tokens * 4 * width, 2 * tokens * width
    assert {"gelu: coded in 3 bits", "dropout: exact one-bit mask"} <= set(what_happened(report))
    assert report.plain_bytes - report.fewbit_bytes == inner * 2 - inner * 3 // 8 + masks - masks // 8


def test_training_in_full_and_frozen() -> None:
    def trained(training: str, name: str) -> list[str]:
        module = block.Case(name, training, "float32", 1, 1, 64).module()
        return [path for path, parameter in module.named_parameters() if parameter.requires_grad]

    assert trained("frozen", "mlp") == []
    assert trained("frozen", "transformer") == ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
    assert len(trained("full", "mlp")) == 4


@pytest.mark.slow
def test_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "in_fresh_process", in_this_process)
    data = run("step", "--layers 1 --batch 1 --sequence 32 --lora --bits 2 --seconds 0.01", tmp_path)
    results = data["results"]
    assert data["settings"]["dtype"] == "float32"
    assert list(results["timings"]) == list(results["memory"]) == list(results["saved_bytes"]) == list(BACKENDS)
    assert "gelu: coded in 2 bits" in results["sites"]
    saved, memory = results["saved_bytes"], results["memory"]
    assert saved[FEWBIT] < saved[BUDGETED] <= saved[INDUCTOR]
    for name in (BUDGETED, FEWBIT):
        freed = saved[INDUCTOR] - saved[name]
        assert memory[INDUCTOR]["held_bytes"] - memory[name]["held_bytes"] == pytest.approx(freed, rel=0.01)
        assert memory[name]["peak_bytes"] > memory[name]["held_bytes"]


def test_step_of_roberta() -> None:
    flags = step._parser().parse_args(["--model", "roberta", "--layers", "1", "--sequence", "16"])
    settings = step.Settings.of(flags)
    assert (settings.batch, settings.dtype) == (2, "float32")
    config = FewBitConfig(recipe="derivatives")
    report = fewbit_fx.explain(settings.initial_model(), *settings.batches()[0], fewbit_config=config)
    (gelu,) = (site for site in report.sites if site.function == "gelu")
    assert (gelu.shape, action(gelu)) == ((2, 16, 4 * 768), "coded in 3 bits")
    assert [action(s) for s in report.sites if s.function == "dropout"].count("exact one-bit mask") >= 3


def test_settings_survive_the_way_to_another_process() -> None:
    settings = step.Settings("gpt", 3, 2, 128, recipe="lean", bits=4, dtype="bfloat16", lora=True, device="cpu")
    assert step.Settings.of(step._parser().parse_args(settings.to_flags())) == settings


def test_settings_of_the_demo_survive_the_way_to_another_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = demo.Settings("llama", "lean", bits=2, steps=3, seed=5, device="cpu", dtype="bfloat16", lora=True)
    seen: list[object] = []
    monkeypatch.setattr(demo, "_memory_in_this_process", lambda *given: seen.extend(given) or Memory(1, 2))
    demo.main([*settings.to_flags(), f"--measure-memory={BUDGETED}"])
    assert seen == [settings, BUDGETED]
    assert json.loads(capsys.readouterr().out) == {"held_bytes": 1, "peak_bytes": 2}


def test_memory_is_measured_from_the_third_step_on() -> None:
    calls: list[str] = []

    def train() -> None:
        calls.append("step")
        kept = torch.ones(1024)
        torch.ones(2048)
        kept += torch.ones(512).sum()

    def forward() -> torch.Tensor:
        calls.append("forward")
        return torch.ones(1024)

    memory = Memory.of_training(train, forward, torch.device("cpu"))
    assert calls == ["step", "step", "step", "forward"]
    assert memory == Memory(held_bytes=4096, peak_bytes=4096 + 8192)


def tokens(batch: int = 4, length: int = 32) -> Batch:
    return torch.randint(256, (batch, length)), torch.randint(256, (batch, length))


@pytest.mark.slow
def test_the_budget_holds_for_its_own_compilations_alone() -> None:
    """Dynamo hands one model what it compiled for another of the same class, if the backend is the same."""
    model, batch = language_model("gpt", lora=False, layers=1, context=32), tokens()
    report = fewbit_fx.explain(model, *batch)
    saved = {
        INDUCTOR: report.plain_bytes,
        BUDGETED: saved_bytes_within_budget(model, batch),
        FEWBIT: report.fewbit_bytes,
    }
    assert saved[FEWBIT] < saved[BUDGETED] < saved[INDUCTOR]
    assert fewbit_fx.explain(model, *batch).plain_bytes == saved[INDUCTOR]
    cpu = torch.device("cpu")
    runners = [Runner(name, model, backend_of(name), lambda: batch, 1, 0, cpu, torch.float32) for name in BACKENDS]
    for runner in (*runners, *reversed(runners)):
        held = measure.held_bytes(lambda runner=runner: runner.forward(batch), cpu)
        compiling = 4096  # what a first call leaves
        assert held == pytest.approx(saved[runner.name], abs=compiling)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_adapters_alone_are_trained(name: str) -> None:
    model = language_model(name, lora=True, layers=1, context=32)
    model(*tokens()).backward()
    trained = {path for path, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert {path.split(".")[-2] for path in trained} == {"down", "up"}
    assert all(".attention." in path for path in trained)


def test_llama_does_not_see_what_is_to_come() -> None:
    model = language_model("llama", lora=False, layers=2, context=32)
    inputs, targets = tokens()
    losses = [model(inputs[:, :length], targets[:, :length]) for length in (16, 32)]
    inputs[:, 16:] = 0
    assert torch.allclose(model(inputs[:, :16], targets[:, :16]), losses[0])
    targets[:, 16:] = -100  # no targets
    assert torch.allclose(model(inputs, targets), losses[0], atol=1e-6)


def test_llama_tells_positions_apart() -> None:
    """Without rotary embeddings, attention to equal tokens would not know in which order they come."""
    torch.manual_seed(0)
    model = language_model("llama", lora=False, layers=1, context=4)
    model.apply(lambda module: torch.nn.init.normal_(module.weight) if isinstance(module, torch.nn.Linear) else None)
    targets = torch.tensor([[-100, -100, 5]])
    first, second = (model(torch.tensor([[a, b, 3]]), targets) for a, b in ((1, 2), (2, 1)))
    assert not torch.allclose(first, second, rtol=1e-4)


def test_step_of_vit() -> None:
    settings = step.Settings.of(step._parser().parse_args(["--model", "vit", "--layers", "1", "--batch", "2"]))
    config = FewBitConfig(recipe="derivatives")
    report = fewbit_fx.explain(settings.initial_model(), *settings.batches()[0], fewbit_config=config)
    (gelu,) = (site for site in report.sites if site.function == "gelu")
    assert (gelu.shape, action(gelu)) == ((2, step.IMAGE_TOKENS, 4 * 256), "coded in 3 bits")
    assert not [site for site in report.sites if site.function == "dropout"]


def test_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Example:
        layers = (torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64), torch.nn.LayerNorm(64))
        inputs = {"input": torch.randn(128, 64)}
        return Example(torch.nn.Sequential(*layers), inputs, lambda y: y.float().pow(4).mean())

    monkeypatch.setattr(saved, "architectures", lambda: [Architecture("MLP", "other", build)])
    (row,) = run("saved", "--only MLP", tmp_path)["rows"]
    exact, default, lean = (row["recipes"][name] for name in saved.RECIPES)
    assert exact["saved_bytes"] > default["saved_bytes"] > lean["saved_bytes"] > 0
    assert row["inductor_bytes"] >= row["budget_bytes"] >= exact["saved_bytes"]
    assert exact["gradient_error"] == exact["codes_error"] == 0
    assert 0 < default["codes_error"] < lean["codes_error"] < 0.05
    assert default["codes_error"] < default["gradient_error"] < 0.05, "rounded otherwise as well"
    assert all(case["loss_identical"] for case in row["recipes"].values())
    (in_float32,) = run("saved", "--only MLP --dtype float32", tmp_path)["rows"]
    assert in_float32["recipes"]["lean"]["codes_error"] == lean["codes_error"]


@pytest.mark.slow
def test_convergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "language_model", lambda name, lora: language_model(name, lora, layers=1))
    data = run("convergence", "--model llama --recipes exact --seeds 1 --steps 2", tmp_path)
    assert [(r["recipe"], r["seed"]) for r in data["runs"]] == [("inductor", 0), ("exact", 0)]
    plain, exact = (r["validation_loss"] for r in data["runs"])
    assert plain == pytest.approx(exact, rel=1e-3)


@pytest.mark.slow
def test_compile_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_time, "in_fresh_process", in_this_process)
    data = run("compile_time", "--layers 1 --repeats 1 --batch 1 --bits 1", tmp_path)
    (row,) = data["rows"]
    assert data["growths"] == []
    assert [(c["backend"], c["coded"]) for c in data["compilations"]] == [
        ("inductor", 0),
        ("budget_0.9", 0),
        ("fewbit", 7),
    ]
    assert row["layers"] == 1
    assert 0 < row["pass_s"] < row["fewbit_s"]
    assert row["share"] == row["pass_s"] / row["inductor_s"]


def test_compilations_alternate_and_large_models_are_compiled_once() -> None:
    turns = [(layers, backend[0]) for layers, backend in compile_time._turns(None, [48, 2])]
    assert [layers for layers, _ in turns] == [2, 2, 2, 48, 48, 48, *[2] * 6]
    assert "".join(backend for _, backend in turns) == "ibf" + "ibf" + "fbi" + "ibf"
    assert len(compile_time._turns(5, [48, 2])) == 30


def test_growth_of_the_passes() -> None:
    found = [
        Compilation(backend, layers, 10.0 * layers, passes * layers**1.5, 0)
        for layers in (48, 2, 12)
        for backend, passes in (
            ("inductor", 0.0),
            ("budget_0.9", 0.0),
            ("fewbit", 1.0),
            ("fewbit", 3.0),
            ("fewbit", 1.0),
        )
    ]
    rows = compile_time.summarise(found)
    assert [(row.layers, row.repeats) for row in rows] == [(2, 1), (12, 1), (48, 1)]
    assert rows[1].pass_s == rows[1].pass_s_per_layer * 12 == 12**1.5
    assert rows[1].share == pytest.approx(12**1.5 / 120)
    assert (rows[1].budget_s, rows[1].budget_ratio, rows[1].ratio) == (120, 1, 1)
    growths = compile_time.growths(rows)
    assert [(g.layers, g.more_layers) for g in growths] == [(2, 12), (12, 48), (2, 48)]
    assert [g.exponent for g in growths] == pytest.approx([1.5, 1.5, 1.5])


def test_ctrl_c_shows_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_or_stop(_: object, backend: str, layers: int) -> Compilation:
        if layers == 12:
            raise KeyboardInterrupt
        return Compilation(backend, layers, 4.0, 1.0, 7)

    monkeypatch.setattr(compile_time, "compile_in_fresh_process", compile_or_stop)
    data = run("compile_time", "--layers 2 12", tmp_path)
    assert [row["layers"] for row in data["rows"]] == [2]
    assert "interrupted" in capsys.readouterr().out


def test_kernels_of_a_gpu_are_counted_and_compiled(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton, which generates a GPU's kernels, is not installed")
    if not hasattr(torch._inductor.config, "loop_reindexing_after_fusion"):
        pytest.skip("Inductor of this torch cannot reindex loops to fuse them")
    from bench import kernels

    kernels.main(["--blocks", "mlp, silu", "--bits", "3", "--recipes", "--output", str(tmp_path / "kernels")])
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [(row["dtype"], row["bits"]) for row in rows] == [(d, b) for d in ("float32", "bfloat16") for b in (None, 3)]
    assert {row["recipe"] for row in rows} == {None}
    for plain, fewbit in zip(rows[::2], rows[1::2], strict=True):
        for direction in ("forward", "backward"):
            assert fewbit[direction]["kernels"] == plain[direction]["kernels"]
            assert fewbit[direction]["spilled_at_best_bytes"] == 0
            assert 0 < fewbit[direction]["registers"] <= 255
        assert fewbit["forward"]["stores"] == plain["forward"]["stores"] + 3, "a store for each plane"


@pytest.mark.slow
def test_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bias, "LAYERS", 1)
    few = [s for s in bias.settings() if (s.sites, s.bits) in (("derivatives", 3), ("norms", 4), ("values", 4))]
    monkeypatch.setattr(bias, "settings", lambda: iter(few))
    rows = run("bias", "--models vit --steps 1 --batches 3", tmp_path)["rows"]
    assert [(r["sites"], r["bits"], r["rounding"]) for r in rows] == [(s.sites, s.bits, s.rounding) for s in few]
    by_rounding = {(r["sites"], r["rounding"]): r for r in rows}
    for sites in ("norms", "values"):
        nearest, stochastic = (by_rounding[sites, rounding] for rounding in ("nearest", "stochastic"))
        assert stochastic["bias"] < nearest["bias"] < 1
    assert (tmp_path / "bias.png").stat().st_size > 10_000


def test_bias_and_scatter_of_known_errors() -> None:
    torch.manual_seed(0)
    exact = torch.randn(200, 1000)  # of variance 1 in each parameter
    error = 0.3 + 0.1 * torch.randn(200, 1000)
    row = bias.row_of("gpt", next(bias.settings()), exact, exact + error)
    assert row.bias == pytest.approx(0.3, rel=0.02)
    assert row.scatter == pytest.approx(0.1, rel=0.02)
