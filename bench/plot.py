"""The demo's picture: both loss curves and the memory bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from bench.training import Runner

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

COLOURS = {"inductor": "#8a8f98", "fewbit": "#d1495b"}
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
    colour = COLOURS[runner.name]
    dashed = "--" if runner.name == "fewbit" else "-"
    values = np.array(runner.training.losses)
    if len(values) >= SMOOTHING:
        smooth = np.convolve(values, np.ones(SMOOTHING) / SMOOTHING, mode="valid")
        axes.plot(
            runner.training.steps[SMOOTHING - 1 :], smooth, dashed, color=colour, label=f"{runner.name}, training"
        )
    if runner.validation.steps:
        points = runner.validation.steps, runner.validation.losses
        axes.plot(
            *points,
            "o",
            color=colour,
            mfc="none" if runner.name == "inductor" else colour,
            ms=8 if runner.name == "inductor" else 4,
            label=f"{runner.name}, validation",
        )


def _draw_memory(axes: Any, results: Mapping[str, Any]) -> None:
    measures = {
        "saved_bytes": "saved for backward\n(graphs)",
        "held_bytes": "held after forward\n(allocator)",
        "peak_bytes": "peak of a step\n(CUDA)",
    }
    shown = {k: v for k, v in measures.items() if all(getattr(r, k) is not None for r in results.values())}
    for i, (name, result) in enumerate(results.items()):
        heights = [getattr(result, key) / 2**20 for key in shown]
        bars = axes.bar(np.arange(len(shown)) + 0.38 * (i - 0.5), heights, 0.36, color=COLOURS[name], label=name)
        axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.set_xticks(range(len(shown)), list(shown.values()))
    axes.set(ylabel="MiB", title="less memory")
    if shown:
        axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # the legend's room
        axes.legend(frameon=False, ncols=2)
