"""Train a byte-level GPT twice, with backend inductor and with fewbit, and show what it bought.

python -m bench.demo --bits 3 --steps 400
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fewbit_fx
from bench.command import DTYPES, Command, MiB, add_bits, count_flag, milliseconds, parser_of
from bench.corpus import Corpus
from bench.gpt import GPT, GPTConfig
from bench.measure import Memory, relative_error, warm_up_the_compiler
from bench.plot import save_plot
from bench.timing import Timing, timings_of
from bench.training import Batch, Runner, autocast

BACKENDS = ("inductor", "fewbit")
SEED = 0
BATCH = 4
BLOCK = 10  # steps that one backend takes before the other's turn
VALIDATIONS = 5
CAPTION = "±: half the distance of the quartiles"


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

    def to_flags(self) -> list[str]:
        """The command line that gives these settings."""
        values = {name: value for name, value in asdict(self).items() if name != "lora"}
        return [f"--{name}={value}" for name, value in values.items()] + ["--lora"] * self.lora

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
    """What one backend came to; None is what has not been measured yet.

    Attributes:
        saved_bytes: Saved for the backward by the graphs, without parameters.
        held_bytes, peak_bytes: See :class:`bench.measure.Memory`.
        validation_loss: After the last step, in nats per byte.
        timing: Of a step; the ratio is to inductor's same step.
        compile_s: Of the first forward and backward, in seconds.
    """

    saved_bytes: int | None = None
    held_bytes: int | None = None
    peak_bytes: int | None = None
    validation_loss: float | None = None
    timing: Timing | None = None
    compile_s: float | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags and run."""
    parser = parser_of("demo", __doc__)
    add_bits(parser)
    parser.add_argument("--steps", type=count_flag, default=400, help="training steps of each run (default 400)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="bfloat16: autocast")
    parser.add_argument("--lora", action="store_true", help="train only low-rank adapters on attention")
    parser.add_argument("--measure-memory", choices=BACKENDS, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    settings = Settings(flags.bits, flags.steps, flags.device.type, flags.dtype, flags.lora)
    if flags.measure_memory:
        print(json.dumps(asdict(_memory_in_this_process(settings, flags.measure_memory))))
        return
    notes = [f"{k} {v}" for k, v in asdict(settings).items()] + [f"batch {BATCH} x {GPTConfig.context}"]
    Demo(settings, Command.started("demo", arguments, flags, notes)).run()


class Demo:
    """One run of the demo."""

    def __init__(self, settings: Settings, command: Command) -> None:
        self.settings = settings
        self.command = command
        self.console = command.console
        self.corpus = Corpus.of_standard_library()
        self.runners = [settings.runner(name, self.corpus) for name in BACKENDS]
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
                    started, before = time.perf_counter(), runner.steps  # of the line on the screen alone

                    def advance(loss: float, runner: Runner = runner, t: float = started, n: int = before) -> None:
                        rate = (runner.steps - n) / (time.perf_counter() - t)
                        status = f"loss {loss:.3f}  {rate:.2f} steps/s"
                        progress.update(tasks[runner.name], completed=runner.steps, status=status)

                    runner.run(size, advance)
                    self._note(runner, validation if runner.steps in milestones else None)

    def _note(self, runner: Runner, validation: list[Batch] | None) -> None:
        result = self.results[runner.name]
        result.compile_s = runner.compile_time
        if validation:
            result.validation_loss = runner.validate(validation)

    def _measure_memory(self) -> None:
        """Each backend in a fresh process, so that neither sees the other's memory."""
        for name, result in self.results.items():
            self.console.print(f"measuring memory in a fresh process: {name} ...")
            memory = Memory.in_fresh_process("bench.demo", self.settings.to_flags(), name)
            result.held_bytes, result.peak_bytes = memory.held_bytes, memory.peak_bytes

    def _compare_times(self) -> None:
        """The steps that both runs have taken, each against the same step of the other."""
        paired = min(len(r.step_times) for r in self.runners)
        if paired >= 2:
            for name, timing in timings_of({r.name: r.step_times[:paired] for r in self.runners}).items():
                self.results[name].timing = timing

    def _show(self) -> None:
        self._compare_times()
        rows = [(name, *values) for name, *values in self._rows() if any(v != "-" for v in values[:2])]
        table = Table("", *self.results, "fewbit against inductor", title="what fewbit bought", caption=CAPTION)
        for row in rows:
            table.add_row(*row)
        if self.report is not None:
            print(f"\n{self.report}\n")
        curves = {r.name: {"training": asdict(r.training), "validation": asdict(r.validation)} for r in self.runners}
        results = {name: asdict(result) for name, result in self.results.items()}
        self.command.finish(table, {"results": results, "first_step": self._first_step(), "curves": curves})
        picture = self.command.output.with_suffix(".png")
        save_plot(picture, self.runners, self.results, self.command.about)
        self.console.print(f"wrote {picture}")

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        plain, fewbit = self.results["inductor"], self.results["fewbit"]
        yield _row("saved for backward by the graphs", plain.saved_bytes, fewbit.saved_bytes, _mib, "change")
        yield _row("held after a forward (allocator)", plain.held_bytes, fewbit.held_bytes, _mib, "change")
        yield _row("peak of a step (CUDA allocator)", plain.peak_bytes, fewbit.peak_bytes, _mib, "change")
        yield _row("validation loss", plain.validation_loss, fewbit.validation_loss, lambda v: f"{v:.4f}", "change")
        if plain.timing and fewbit.timing:
            timings = milliseconds(plain.timing), milliseconds(fewbit.timing)
            yield "median step, ms", *timings, f"x {fewbit.timing.ratio:.2f}"
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


def _memory_in_this_process(settings: Settings, backend: str) -> Memory:
    corpus = Corpus.of_standard_library()
    runner = settings.runner(backend, corpus)
    batch = corpus.batch(BATCH, GPTConfig.context, torch.Generator().manual_seed(SEED))
    return Memory.of_training(
        lambda: runner.run(1, lambda _: None), lambda: runner.forward(batch), settings.torch_device
    )


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
