"""The table of the demo's runs: what fewbit buys, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.command import MiB
from bench.result_file import File, markdown, measured_with
from fewbit_fx.config import FewBitConfig

NOTHING = "-"


@dataclass(frozen=True)
class Training:
    """One run of the demo.

    Attributes:
        bits: Bits per coded element.
        lora: Whether only adapters were trained.
        steps: Of the training.
        inductor, fewbit: What each came to; a value is None where the run was ended before it was measured.
        gradient_error: Relative, of the first gradient; None likewise.
    """

    bits: int
    lora: bool
    steps: int
    inductor: Mapping[str, Any]
    fewbit: Mapping[str, Any]
    gradient_error: float | None

    @classmethod
    def of(cls, file: File) -> Training:
        """What a file tells."""
        return cls(
            bits=int(file.setting("bits")),
            lora=file.setting("lora") == "True",
            steps=int(file.setting("steps")),
            inductor=file.data["results"]["inductor"],
            fewbit=file.data["results"]["fewbit"],
            gradient_error=file.data["first_step"].get("gradient_error"),
        )

    @property
    def step_ratio(self) -> float | None:
        """fewbit's median step over inductor's; files from before there were timings have milliseconds."""
        if "step_ms" not in self.fewbit:
            return self.fewbit["timing"] and self.fewbit["timing"]["ratio"]  # type: ignore[no-any-return]
        plain, fewbit = self.inductor["step_ms"], self.fewbit["step_ms"]
        return fewbit / plain if plain and fewbit else None

    def cells(self, longest: int) -> Iterator[str]:
        """The run's row; without loss and time where it is shorter than the longest."""
        yield f"LoRA, {self.bits}" if self.lora else f"{self.bits}{' (default)' * (self.bits == FewBitConfig.bits)}"
        plain, fewbit = self.inductor["held_bytes"], self.fewbit["held_bytes"]
        yield f"{_mebibytes(fewbit)} ({100 * (fewbit / plain - 1):+.1f} %)" if plain and fewbit else NOTHING
        plain, fewbit = self.inductor["validation_loss"], self.fewbit["validation_loss"]
        whole = self.steps == longest
        yield f"{100 * (fewbit / plain - 1):+.2f} %" if whole and plain and fewbit else NOTHING
        yield f"x {self.step_ratio:.2f}" if whole and self.step_ratio else NOTHING
        yield NOTHING if self.gradient_error is None else f"{100 * self.gradient_error:#.2g}".rstrip(".") + " %"


def lines(files: Sequence[File]) -> Iterator[str]:
    """The demo's runs, those of LoRA behind the others, each group led by inductor, with most bits first."""
    runs = sorted(map(Training.of, files), key=lambda run: (run.lora, -run.bits))
    longest = max(run.steps for run in runs)
    rows = []
    for lora in (False, True):
        group = [run for run in runs if run.lora == lora]
        rows += [[*_of_inductor(group, longest)]] if group else []
        rows += [[*run.cells(longest)] for run in group]
    bold = [[f"**{cell}**" if "default" in row[0] and cell != NOTHING else cell for cell in row] for row in rows]
    head = ("bits", "saved for backward", "validation loss", "median step", "error of the first gradient")
    yield from markdown(head, *bold)
    short = [f"row {'LoRA, ' * run.lora}{run.bits}: {run.steps} steps" for run in runs if run.steps < longest]
    notes = f" ({', '.join(short)}, too few for a loss and a time)" if short else ""
    yield f"\n<sub>{measured_with(files)}; {longest} steps{notes}.</sub>"


def _of_inductor(runs: Sequence[Training], longest: int) -> Iterator[str]:
    yield "LoRA, inductor" if runs[0].lora else "inductor"
    yield _range([run.inductor["held_bytes"] for run in runs], _mebibytes)
    yield _range([run.inductor["validation_loss"] for run in runs if run.steps == longest], lambda loss: f"{loss:.3f}")
    yield ""
    yield "exact"


def _range(values: Iterable[float | None], show: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return " to ".join(dict.fromkeys((show(min(known)), show(max(known))))) if known else NOTHING


def _mebibytes(count: float) -> str:
    return f"{count / MiB:.1f} MiB"
