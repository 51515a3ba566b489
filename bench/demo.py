"""Train a byte-level GPT twice, with backend inductor and with fewbit, and show what it bought.

python -m bench.demo --bits 3 --steps 400
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fewbit_fx
from bench.corpus import Corpus
from bench.gpt import GPT, GPTConfig
from bench.measure import conditions, held_bytes, in_fresh_process, relative_error, warm_up_the_compiler
from bench.plot import save_plot
from bench.training import Batch, Runner, autocast

SEED = 0
BATCH = 4
BLOCK = 10  # steps that one backend takes before the other's turn
VALIDATIONS = 5
MiB = 2**20


@dataclass(frozen=True)
class Settings:
    """The demo's flags."""

    bits: int
    steps: int
    device: str
    dtype: str
    lora: bool

    @property
    def torch_device(self) -> torch.device:
        """The device to train on."""
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """float32, or the dtype to autocast to."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def model(self) -> GPT:
        """The model at its seed's initial weights."""
        torch.manual_seed(SEED)
        return GPT(GPTConfig(lora_rank=8 if self.lora else 0)).to(self.torch_device)

    def runner(self, name: str, corpus: Corpus) -> Runner:
        """A runner whose batches are the same for every backend."""
        generator = torch.Generator().manual_seed(SEED)
        options = {"bits": self.bits} if name == "fewbit" else {}
        return Runner(
            name,
            self.model(),
            backend=name,
            options=options,
            batches=lambda: corpus.batch(BATCH, GPTConfig.context, generator),
            steps=self.steps,
            seed=SEED + 1,
            device=self.torch_device,
            dtype=self.torch_dtype,
        )


@dataclass
class Result:
    """What one backend came to."""

    saved_bytes: int | None = None
    held_bytes: int | None = None
    peak_bytes: int | None = None
    validation_loss: float | None = None
    step_ms: float | None = None
    compile_s: float | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(prog="bench.demo", description=__doc__)
    parser.add_argument("--bits", type=int, default=3, help="bits per coded element, 1 to 8 (default 3)")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each run (default 400)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--lora", action="store_true", help="train only low-rank adapters on attention")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="PATH.png and PATH.json (default demo)")
    parser.add_argument("--measure-memory", choices=["inductor", "fewbit"], help=argparse.SUPPRESS)
    flags = vars(parser.parse_args(arguments))
    output, measured = flags.pop("output"), flags.pop("measure_memory")
    settings = Settings(**flags)
    fewbit_fx.FewBitConfig(bits=settings.bits)  # a bad --bits fails here, not after minutes
    if measured:
        print(json.dumps(_memory_in_this_process(settings, measured)))
    else:
        Demo(settings, output).run()


class Demo:
    """One run of the demo."""

    def __init__(self, settings: Settings, output: Path) -> None:
        self.settings = settings
        self.output = output
        self.console = Console()
        self.corpus = Corpus.of_standard_library()
        self.runners = [settings.runner(name, self.corpus) for name in ("inductor", "fewbit")]
        self.results = {r.name: Result() for r in self.runners}
        self.report: fewbit_fx.Report | None = None

    def run(self) -> None:
        """Train, measure, show; Ctrl-C skips to what there is to show."""
        say = self.console.print
        say(
            f"[bold]fewbit-fx demo[/]: {self._parameters():,} trained parameters, "
            f"{len(self.corpus.training) / MiB:.1f} MiB of Python to learn from"
        )
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # compile times are those of a first run
            try:
                self._explain()
                warm_up_the_compiler(self.settings.torch_device)
                self._train()
                self._measure_memory()
            except KeyboardInterrupt:
                say("[yellow]interrupted; this is what there is so far[/]")
        self._show()

    def _parameters(self) -> int:
        return sum(p.numel() for p in self.runners[0].model.parameters() if p.requires_grad)

    def _explain(self) -> None:
        self.console.print("tracing the model ...")
        runner = self.runners[1]
        batch = self.corpus.batch(BATCH, GPTConfig.context, torch.Generator().manual_seed(SEED))
        with autocast(self.settings.torch_device, self.settings.torch_dtype):
            inputs = [t.to(self.settings.torch_device) for t in batch]
            config = fewbit_fx.FewBitConfig(bits=self.settings.bits)
            self.report = fewbit_fx.explain(runner.model, *inputs, fewbit_config=config)
        self.results["inductor"].saved_bytes = self.report.plain_bytes
        self.results["fewbit"].saved_bytes = self.report.fewbit_bytes

    def _train(self) -> None:
        validation = self.corpus.validation_batches(2 * BATCH, GPTConfig.context, 8)
        steps = self.settings.steps
        milestones = {round(steps * (i + 1) / VALIDATIONS) for i in range(VALIDATIONS)}
        with _progress(self.console) as progress:
            tasks = {r.name: progress.add_task(r.name, total=steps, status="compiling") for r in self.runners}
            for size in _blocks(steps, milestones):
                for runner in self.runners:
                    started, before = time.perf_counter(), runner.steps

                    def advance(loss: float, runner: Runner = runner, t: float = started, n: int = before) -> None:
                        rate = (runner.steps - n) / (time.perf_counter() - t)
                        status = f"loss {loss:.3f}  {rate:.2f} steps/s"
                        progress.update(tasks[runner.name], completed=runner.steps, status=status)

                    runner.run(size, advance)
                    self._note(runner, validation if runner.steps in milestones else None)

    def _note(self, runner: Runner, validation: list[Batch] | None) -> None:
        result = self.results[runner.name]
        result.compile_s = runner.compile_time
        if runner.step_times:
            result.step_ms = 1e3 * statistics.median(runner.step_times)
        if validation:
            result.validation_loss = runner.validate(validation)

    def _measure_memory(self) -> None:
        """Each backend in a fresh process, so that neither sees the other's memory."""
        for name, result in self.results.items():
            self.console.print(f"measuring memory in a fresh process: {name} ...")
            found = _memory_in_fresh_process(self.settings, name)
            result.held_bytes, result.peak_bytes = found["held"], found["peak"]

    def _show(self) -> None:
        say = self.console.print
        rows = [(name, *values) for name, *values in self._rows() if any(v != "-" for v in values[:2])]
        table = Table("", *self.results, "fewbit against inductor", title="what fewbit bought")
        for row in rows:
            table.add_row(*row)
        if self.report is not None:
            print(f"\n{self.report}\n")
        say(table)
        settings = [f"{k} {v}" for k, v in asdict(self.settings).items()] + [f"batch {BATCH} x {GPTConfig.context}"]
        about = conditions(self.settings.torch_device, settings)
        say("  ".join(f"[dim]{k}:[/] {v}" for k, v in about.items()))
        data = {
            "conditions": about,
            "results": {name: asdict(result) for name, result in self.results.items()},
            "first_step": self._first_step(),
            "curves": {
                r.name: {"training": asdict(r.training), "validation": asdict(r.validation)} for r in self.runners
            },
        }
        self.output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        save_plot(self.output.with_suffix(".png"), self.runners, self.results, about)
        say(f"wrote {self.output.with_suffix('.png')} and {self.output.with_suffix('.json')}")

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        plain, fewbit = self.results["inductor"], self.results["fewbit"]
        yield _row("saved for backward by the graphs", plain.saved_bytes, fewbit.saved_bytes, _mib, "change")
        yield _row("held after a forward (allocator)", plain.held_bytes, fewbit.held_bytes, _mib, "change")
        yield _row("peak of a step (CUDA allocator)", plain.peak_bytes, fewbit.peak_bytes, _mib, "change")
        yield _row("validation loss", plain.validation_loss, fewbit.validation_loss, lambda v: f"{v:.4f}", "change")
        yield _row("median step", plain.step_ms, fewbit.step_ms, lambda v: f"{v:.0f} ms", "ratio")
        yield _row("compile (first step, cold)", plain.compile_s, fewbit.compile_s, lambda v: f"{v:.1f} s", "ratio")
        first = self._first_step()
        if first:
            same = "bit-identical" if first["loss_identical"] else "differs"
            yield "loss of the first step", f"{first['loss']:.6f}", same, ""
            yield "gradient of the first step", "exact", f"{first['gradient_error']:.2%} error", ""

    def _first_step(self) -> dict[str, Any]:
        plain, fewbit = self.runners
        if plain.first_loss is None or fewbit.first_loss is None:
            return {}
        assert plain.first_gradient is not None
        assert fewbit.first_gradient is not None
        return {
            "loss": float(plain.first_loss),
            "loss_identical": torch.equal(plain.first_loss, fewbit.first_loss),
            "gradient_error": relative_error(fewbit.first_gradient, plain.first_gradient),
        }


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    return Progress(*columns, console=console)


def _blocks(steps: int, milestones: set[int]) -> Iterator[int]:
    """Sizes of the blocks, cut at the milestones."""
    done = 0
    while done < steps:
        end = min([done + BLOCK, steps, *(m for m in milestones if m > done)])
        yield end - done
        done = end


def _memory_in_this_process(settings: Settings, name: str) -> dict[str, int | None]:
    runner = settings.runner(name, Corpus.of_standard_library())
    batch = Corpus.of_standard_library().batch(BATCH, GPTConfig.context, torch.Generator().manual_seed(SEED))
    runner.run(2, lambda _: None)  # compiled, and the optimizer has its state
    held = held_bytes(lambda: runner.forward(batch), settings.torch_device)
    peak = None
    if settings.torch_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(settings.torch_device)
        runner.run(1, lambda _: None)
        peak = torch.cuda.max_memory_allocated(settings.torch_device)
    return {"held": held, "peak": peak}


def _memory_in_fresh_process(settings: Settings, name: str) -> dict[str, int | None]:
    flags = [f"--{flag}={value}" for flag, value in asdict(settings).items() if flag != "lora"]
    flags += ["--lora"] * settings.lora + [f"--measure-memory={name}"]
    return in_fresh_process("bench.demo", flags)  # type: ignore[no-any-return]


def _mib(value: float) -> str:
    return f"{value / MiB:.1f} MiB"


def _row(title: str, plain: Any, fewbit: Any, show: Any, compare: str) -> tuple[str, str, str, str]:
    texts = [show(v) if v is not None else "-" for v in (plain, fewbit)]
    if plain is None or fewbit is None:
        return title, *texts, "-"  # type: ignore[return-value]
    against = f"{fewbit / plain - 1:+.2%}" if compare == "change" else f"x {fewbit / plain:.2f}"
    return title, texts[0], texts[1], against


if __name__ == "__main__":
    main()
