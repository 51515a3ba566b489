"""The picture of bench.bias: the bias of each setting against its scatter, for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_COLOURS = {
    "derivatives": "#30638e",
    "values": "#d1495b",
    "norms": "#edae49",
    "softmax": "#00798c",
    "default": "#222222",
    "lean": "#8a8f98",
}
_MARKERS = {"nearest": "o", "stochastic": "x"}
_LEAST = 1e-4  # of a share that is drawn


def save_plot(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> None:
    """Draw one panel for each model into a PNG."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(
        1, len(models), figsize=(5 * len(models), 4.4), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for model, axes in zip(models, panels[0], strict=True):
        _draw(axes, [row for row in rows if row["model"] == model])
        axes.set(title=model, xlabel="scatter, share of the noise between batches", xscale="log", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("bias, share of the noise between batches")
    handles = [plt.Line2D([], [], color=c, marker="o", ls="", label=name) for name, c in _COLOURS.items()]
    handles += [plt.Line2D([], [], color="#666666", marker=m, ls="", label=name) for name, m in _MARKERS.items()]
    panels[0][-1].legend(handles=handles, frameon=False, fontsize=8, loc="lower right")
    figure.supxlabel(f"{about['device']}, torch {about['torch']}, {about['date']}: {about['settings']}", fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        x, y = (max(row[name], _LEAST) for name in ("scatter", "bias"))
        axes.plot(x, y, _MARKERS[row["rounding"]], color=_COLOURS[row["sites"]], ms=6)
        if row["bits"]:
            axes.annotate(str(row["bits"]), (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
