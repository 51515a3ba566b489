"""The README's table of convergence: final validation losses by recipe, mean and spread over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from bench.backends import INDUCTOR
from bench.result_file import File, markdown, measured_with


def lines(files: Sequence[File]) -> Iterator[str]:
    """A row for each model and recipe; of several files with both the last by name counts."""
    found: dict[tuple[str, str], list[float]] = {}
    for file in files:
        model = str(file.setting("model"))
        for recipe in dict.fromkeys(run["recipe"] for run in file.data["runs"]):
            found[model, recipe] = [r["validation_loss"] for r in file.data["runs"] if r["recipe"] == recipe]
    head = "validation loss after training", "mean", "least to most", "mean against inductor"
    yield from markdown(head, *(_row(model, recipe, losses, found) for (model, recipe), losses in found.items()))
    seeds = {len(losses) for losses in found.values()}
    many = " or ".join(map(str, sorted(seeds)))
    how = f"{files[0].setting('steps')} steps, {many} seeds, {files[0].setting('dtype')}"
    yield f"\n<sub>{measured_with(files)}; {how}.</sub>"


def _row(model: str, recipe: str, losses: Sequence[float], all_of: dict[tuple[str, str], list[float]]) -> list[str]:
    mean, plain = statistics.mean(losses), statistics.mean(all_of[model, INDUCTOR])
    change = "" if recipe == INDUCTOR else f"{100 * (mean / plain - 1):+.2f} %"
    return [f"{model}, {recipe}", f"{mean:.3f}", f"{min(losses):.3f} to {max(losses):.3f}", change]
