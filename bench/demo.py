"""Train a byte-level language model with inductor, with inductor's own leaner cut and with fewbit, and compare.

python -m bench.demo --recipe default --steps 400
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import fewbit_fx
from bench.backends import BACKENDS, BUDGETED, FEWBIT, INDUCTOR, TITLES, backend_of, saved_bytes_within_budget
from bench.command import DTYPES, Command, MiB, add_bits, add_recipe, count_flag, parser_of, whole_flag
from bench.comparison import CAPTION, NOTHING, changes, mebibytes, ratios, times
from bench.corpus import Corpus
from bench.language_models import CONTEXT, LANGUAGE_MODELS, language_model
from bench.measure import Memory, relative_error, warm_up_the_compiler
from bench.plot import save_plot
from bench.timing import Timing, timings_of
from bench.training import Batch, Runner, autocast

BATCH = 4
BLOCK = 10  # steps that one backend takes before the next one's turn
VALIDATIONS = 5


@dataclass(frozen=True)
class Settings:
    """The demo's flags."""

    model: str
    recipe: str
    bits: int
    steps: int
    seed: int
    device: str
    dtype: str
    lora: bool

    @classmethod
    def of(cls, flags: argparse.Namespace) -> Settings:
        """The settings that the flags ask for."""
        asked = {field.name: getattr(flags, field.name) for field in fields(cls)}
        return cls(**{**asked, "device": flags.device.type})

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

    def initial_model(self) -> nn.Module:
        """The model at its seed's initial weights."""
        torch.manual_seed(self.seed)
        return language_model(self.model, self.lora).to(self.torch_device)

    def first_batch(self, corpus: Corpus) -> Batch:
        """What every training begins with."""
        return corpus.batch(BATCH, CONTEXT, torch.Generator().manual_seed(self.seed))

    def runner(self, name: str, corpus: Corpus) -> Runner:
        """A runner whose batches are the same for every backend."""
        generator = torch.Generator().manual_seed(self.seed)
        return Runner(
            name,
            self.initial_model(),
            backend=backend_of(name, recipe=self.recipe, bits=self.bits),
            batches=lambda: corpus.batch(BATCH, CONTEXT, generator),
            steps=self.steps,
            seed=self.seed + 1,
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
    parser.add_argument("--model", choices=LANGUAGE_MODELS, default="gpt", help="what is trained (default gpt)")
    add_recipe(parser)
    add_bits(parser)
    parser.add_argument("--steps", type=count_flag, default=400, help="training steps of each run (default 400)")
    parser.add_argument(
        "--seed", type=whole_flag, default=0, help="of initial weights, batches and dropout (default 0)"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="bfloat16: autocast")
    parser.add_argument("--lora", action="store_true", help="train only low-rank adapters on attention")
    parser.add_argument("--measure-memory", choices=BACKENDS, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    settings = Settings.of(flags)
    if flags.measure_memory:
        print(json.dumps(asdict(_memory_in_this_process(settings, flags.measure_memory))))
        return
    notes = [f"{k} {v}" for k, v in asdict(settings).items()] + [f"batch {BATCH} x {CONTEXT}"]
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
        settings = self.settings
        model = settings.initial_model()
        with autocast(settings.torch_device, settings.torch_dtype):
            inputs = [t.to(settings.torch_device) for t in settings.first_batch(self.corpus)]
            config = fewbit_fx.FewBitConfig(recipe=settings.recipe, bits=settings.bits)
            self.report = fewbit_fx.explain(model, *inputs, fewbit_config=config)
            self.results[BUDGETED].saved_bytes = saved_bytes_within_budget(model, inputs)
        self.results[INDUCTOR].saved_bytes = self.report.plain_bytes
        self.results[FEWBIT].saved_bytes = self.report.fewbit_bytes

    def _train(self) -> None:
        validation = self.corpus.validation_batches(2 * BATCH, CONTEXT, 8)
        steps = self.settings.steps
        milestones = {round(steps * (i + 1) / VALIDATIONS) for i in range(VALIDATIONS)}
        with _progress(self.console) as progress:
            tasks = {r.name: progress.add_task(TITLES[r.name], total=steps, status="compiling") for r in self.runners}
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
        """Each backend in a fresh process, so that none sees another's memory."""
        for name, result in self.results.items():
            self.console.print(f"measuring memory in a fresh process: {TITLES[name]} ...")
            memory = Memory.in_fresh_process("bench.demo", self.settings.to_flags(), name)
            result.held_bytes, result.peak_bytes = memory.held_bytes, memory.peak_bytes

    def _compare_times(self) -> None:
        """The steps that all runs have taken, each against the same step of inductor."""
        paired = min(len(r.step_times) for r in self.runners)
        if paired >= 2:
            for name, timing in timings_of({r.name: r.step_times[:paired] for r in self.runners}).items():
                self.results[name].timing = timing

    def _show(self) -> None:
        self._compare_times()
        first = {r.name: self._first_step(r) for r in self.runners[1:]}
        table = Table("", *(TITLES[name] for name in self.results), title="what fewbit bought", caption=CAPTION)
        for title, cells in self._rows(list(first.values())):
            if any(cell != NOTHING for cell in cells):
                table.add_row(title, *cells)
        if self.report is not None:
            print(f"\n{self.report}\n")
        curves = {r.name: {"training": asdict(r.training), "validation": asdict(r.validation)} for r in self.runners}
        results = {name: asdict(result) for name, result in self.results.items()}
        about_first = {"first_step": first[FEWBIT], "first_step_within_budget": first[BUDGETED]}
        self.command.finish(table, {"results": results, **about_first, "curves": curves})
        picture = self.command.output.with_suffix(".png")
        save_plot(picture, self.runners, self.results, self.command.about)
        self.console.print(f"wrote {picture}")

    def _rows(self, first: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
        results = list(self.results.values())
        yield "saved for backward by the graphs", changes([r.saved_bytes for r in results], mebibytes)
        yield "held after a forward (allocator)", changes([r.held_bytes for r in results], mebibytes)
        yield "peak of a step (allocator)", changes([r.peak_bytes for r in results], mebibytes)
        yield "validation loss", changes([r.validation_loss for r in results], lambda loss: f"{loss:.4f}")
        timings = [r.timing for r in results if r.timing]
        if len(timings) == len(results):
            yield "median step, ms", times(timings)
        yield "compile (first step, cold)", ratios([r.compile_s for r in results], lambda seconds: f"{seconds:.1f} s")
        if all(first):
            same = ["bit-identical" if step["loss_identical"] else "differs" for step in first]
            yield "loss of the first step", [f"{first[0]['loss']:.6f}", *same]
            yield (
                "gradient of the first step",
                ["exact", *(f"{100 * step['gradient_error']:.2g} % error" for step in first)],
            )

    def _first_step(self, runner: Runner) -> dict[str, Any]:
        """How a runner's first loss and gradient differ from inductor's; empty where one has not got so far."""
        plain = self.runners[0]
        if plain.first_loss is None or runner.first_loss is None:
            return {}
        assert plain.first_gradient is not None
        assert runner.first_gradient is not None
        return {
            "loss": float(plain.first_loss),
            "loss_identical": torch.equal(plain.first_loss, runner.first_loss),
            "gradient_error": relative_error(runner.first_gradient, plain.first_gradient),
        }


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:>20}"),
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
    batch = settings.first_batch(corpus)
    return Memory.of_training(
        lambda: runner.run(1, lambda _: None), lambda: runner.forward(batch), settings.torch_device
    )


if __name__ == "__main__":
    main()
