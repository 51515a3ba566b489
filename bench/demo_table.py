"""The table of the demo's runs: what fewbit buys, and what it costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.backends import BUDGETED, FEWBIT, INDUCTOR, TITLES
from bench.comparison import NOTHING, mebibytes
from bench.result_file import File, markdown, measured_with
from fewbit_fx.config import RECIPES, FewBitConfig


@dataclass(frozen=True)
class Training:
    """One run of the demo.

    Attributes:
        model: What was trained.
        recipe: Of fewbit; None in files from before there were recipes.
        bits: Bits per coded element.
        lora: Whether only adapters were trained.
        steps: Of the training.
        seed: Of weights and batches.
        results: What each backend came to; a value is None where the run was ended before it was measured.
        gradient_error: Relative, of fewbit's first gradient; None likewise.
    """

    model: str
    recipe: str | None
    bits: int
    lora: bool
    steps: int
    seed: int
    results: Mapping[str, Mapping[str, Any]]
    gradient_error: float | None

    @classmethod
    def of(cls, file: File) -> Training:
        """What a file tells."""
        return cls(
            model=file.setting("model", "gpt"),
            recipe=file.setting("recipe", "") or None,
            bits=int(file.setting("bits")),
            lora=file.setting("lora") == "True",
            steps=int(file.setting("steps")),
            seed=int(file.setting("seed", "0")),
            results=file.data["results"],
            gradient_error=file.data["first_step"].get("gradient_error"),
        )

    @property
    def group(self) -> tuple[str, bool]:
        """What runs have in common that are compared with one inductor."""
        return self.model, self.lora

    @property
    def options(self) -> str:
        """What fewbit was told, such as ``3 (default)`` or ``lean, 2 bits``."""
        default = self.bits == FewBitConfig.bits
        if self.recipe is None:
            return f"{self.bits}{' (default)' * (default and not self.lora)}"
        return self.recipe + f", {self.bits} bits" * (not default) + f", seed {self.seed}" * (self.seed != 0)

    @property
    def prefix(self) -> str:
        """What the rows of its group begin with."""
        return _PREFIXES.get(self.model, f"{self.model}, ") + "LoRA, " * self.lora

    @property
    def is_default(self) -> bool:
        """Whether it is what fewbit does without options, to the models of the first group."""
        return self.group == ("gpt", False) and self.options in (f"{FewBitConfig.bits} (default)", FewBitConfig.recipe)

    def place(self) -> tuple[Any, ...]:
        """What runs are sorted by."""
        return *self.group, _RECIPES.index(self.recipe), -self.bits, self.seed

    def step_ratio(self, backend: str) -> float | None:
        """A backend's median step over inductor's; files from before there were timings have milliseconds."""
        own, plain = self.results[backend], self.results[INDUCTOR]
        if "step_ms" not in own:
            return own["timing"] and own["timing"]["ratio"]  # type: ignore[no-any-return]
        return own["step_ms"] / plain["step_ms"] if plain["step_ms"] and own["step_ms"] else None

    def cells(self, backend: str, longest: int) -> Iterator[str]:
        """What a backend came to against inductor; without loss and time where the run is shorter than the longest."""
        plain, own = (self.results[name]["held_bytes"] for name in (INDUCTOR, backend))
        yield f"{mebibytes(own)} ({100 * (own / plain - 1):+.1f} %)" if plain and own else NOTHING
        plain, own = (self.results[name]["validation_loss"] for name in (INDUCTOR, backend))
        whole, ratio = self.steps == longest, self.step_ratio(backend)
        yield f"{100 * (own / plain - 1):+.2f} %" if whole and plain and own else NOTHING
        yield f"x {ratio:.2f}" if whole and ratio else NOTHING

    @property
    def error(self) -> str:
        """Of the first gradient."""
        return NOTHING if self.gradient_error is None else f"{100 * self.gradient_error:#.2g}".rstrip(".") + " %"


def lines(files: Sequence[File]) -> Iterator[str]:
    """The demo's runs, grouped by model and by LoRA, each group led by inductor; the leanest recipe and bits last."""
    runs = sorted(map(Training.of, files), key=Training.place)
    longest = max(run.steps for run in runs)
    rows = []
    for _, members in itertools.groupby(runs, key=lambda run: run.group):
        rows += _rows(list(members), longest)
    has_recipes = any(run.recipe for run in runs)
    head = ("saved for backward", "validation loss", "median step", "error of the first gradient")
    yield from markdown(("recipe" if has_recipes else "bits", *head), *rows)
    short = [f"row {run.prefix}{run.options}: {run.steps} steps" for run in runs if run.steps < longest]
    notes = f" ({', '.join(short)}, too few for a loss and a time)" if short else ""
    yield f"\n<sub>{measured_with(files)}; {longest} steps{notes}.</sub>"


_RECIPES = (None, *RECIPES)
_PREFIXES = {"gpt": "", "llama": "Llama, "}


def _rows(runs: Sequence[Training], longest: int) -> Iterator[list[str]]:
    """One group's rows: inductor, its leaner cut where runs have it, and fewbit."""
    prefix = runs[0].prefix
    whole = [run.results[INDUCTOR]["validation_loss"] for run in runs if run.steps == longest]
    held = [run.results[INDUCTOR]["held_bytes"] for run in runs]
    yield [f"{prefix}{INDUCTOR}", _range(held, mebibytes), _range(whole, lambda loss: f"{loss:.3f}"), "", "exact"]
    budgeted = [list(run.cells(BUDGETED, longest)) for run in runs if BUDGETED in run.results]
    if budgeted:
        yield [f"{prefix}{TITLES[BUDGETED]}", *map(_once, zip(*budgeted, strict=True)), "exact"]
    for run in runs:
        row = [f"{prefix}{run.options}", *run.cells(FEWBIT, longest), run.error]
        yield [f"**{cell}**" if run.is_default and cell != NOTHING else cell for cell in row]


def _once(cells: Iterable[str]) -> str:
    """Each run measures inductor's leaner cut anew: what they found, each cell once."""
    known = dict.fromkeys(cell for cell in cells if cell != NOTHING)
    return ", ".join(known) or NOTHING


def _range(values: Iterable[float | None], show: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return " to ".join(dict.fromkeys((show(min(known)), show(max(known))))) if known else NOTHING
