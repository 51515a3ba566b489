"""The demo's picture: both loss curves and the memory bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from bench.backends import BUDGETED, FEWBIT, INDUCTOR, TITLES
from bench.training import Runner

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

COLOURS = {INDUCTOR: "#8a8f98", BUDGETED: "#30638e", FEWBIT: "#d1495b"}
SMOOTHING = 5


def save_plot(path: Path, runners: Sequence[Runner], results: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Draw what there is to draw into one PNG."""
    figure, (losses, memory) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    for runner in runners:
        _draw_losses(losses, runner)
    losses.set(xlabel="step", ylabel="loss (nats per byte)", title="the same training")
    losses.legend(frameon=False)
    _draw_memory(memory, results)
    for axes in (losses, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"{about['device']}, torch {about['torch']}, {about['date']}: {about['settings']}", fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_losses(axes: Any, runner: Runner) -> None:
    colour, title, is_reference = COLOURS[runner.name], TITLES[runner.name], runner.name == INDUCTOR
    values = np.array(runner.training.losses)
    if len(values) >= SMOOTHING:
        smooth = np.convolve(values, np.ones(SMOOTHING) / SMOOTHING, mode="valid")
        steps = runner.training.steps[SMOOTHING - 1 :]
        axes.plot(steps, smooth, "-" if is_reference else "--", color=colour, label=f"{title}, training")
    if runner.validation.steps:
        axes.plot(
            runner.validation.steps,
            runner.validation.losses,
            "o",
            color=colour,
            mfc="none" if is_reference else colour,
            ms=8 if is_reference else 4,
            label=f"{title}, validation",
        )


def _draw_memory(axes: Any, results: Mapping[str, Any]) -> None:
    measures = {
        "saved_bytes": "saved for\nbackward (graphs)",
        "held_bytes": "held after a\nforward (allocator)",
        "peak_bytes": "peak of a step\n(allocator)",
    }
    shown = {k: v for k, v in measures.items() if all(getattr(r, k) is not None for r in results.values())}
    width = 0.8 / len(results)
    for i, (name, result) in enumerate(results.items()):
        heights = [getattr(result, key) / 2**20 for key in shown]
        places = np.arange(len(shown)) + width * (i - (len(results) - 1) / 2)
        bars = axes.bar(places, heights, 0.95 * width, color=COLOURS[name], label=TITLES[name])
        axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.set_xticks(range(len(shown)), list(shown.values()))
    axes.set(ylabel="MiB", title="less memory")
    if shown:
        axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # the legend's room
        axes.legend(frameon=False, ncols=len(results), fontsize=8)
