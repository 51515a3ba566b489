"""The picture of convergence: the difference to exact training against the error of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.evidence.convergence_cells import Cell, cells
from bench.evidence.methods import REFERENCE
from bench.evidence.tasks import TASKS
from bench.result_file import File, measured_with

_MARKERS = {"GLUE": "o", "images": "s", "language": "^"}
_COLOURS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined,unused-ignore]
_LINEAR = 2.0  # spreads beyond which the axis is logarithmic: a few cells are far out
_TICKS = (-100, -10, -5, -2, -1, 0, 1, 2, 5, 10, 100)


def save_plot(path: Path, files: Sequence[File]) -> None:
    """Draw a marker for each task and method that codes something, by the task's first metric, into a PNG."""
    drawn = [cell for cell in cells(files) if _is_drawn(cell)]
    colours = dict(zip(dict.fromkeys(cell.method for cell in drawn), _COLOURS, strict=False))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.axhspan(-1, 1, color="#eeeeee", zorder=0, label=f"within the spread of {REFERENCE}")
    for cell in drawn:
        marker = _MARKERS[TASKS[cell.task].group]
        axes.plot(cell.gradient_error, cell.in_spreads, marker, color=colours[cell.method], ms=6, alpha=0.8)
    _describe(axes)
    _legend(axes, colours)
    figure.supxlabel(measured_with(files), fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _is_drawn(cell: Cell) -> bool:
    first = TASKS[cell.task].metrics[0]
    return bool(cell.gradient_error) and cell.in_spreads is not None and cell.metric.name == first


def _describe(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=_LINEAR)
    axes.set_yticks(_TICKS, [f"{tick:+}" if tick else "0" for tick in _TICKS])
    axes.set_xlabel("relative error of the gradient, mean of the first and of one halfway")
    axes.set_ylabel(f"difference to {REFERENCE}, in spreads of its seeds\n(above 0: better)")
    axes.set_ylim(*_limits(axes))
    axes.axhline(0, color="#666666", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _limits(axes: Axes) -> tuple[float, float]:
    """Ticks beyond what is drawn would widen the axis."""
    least, most = axes.dataLim.intervaly
    return min(-_LINEAR, 1.2 * least), max(_LINEAR, 1.2 * most)


def _legend(axes: Axes, colours: dict[str, tuple[float, ...]]) -> None:
    handles, _ = axes.get_legend_handles_labels()
    handles += [plt.Line2D([], [], color=c, marker="o", ls="", label=name) for name, c in colours.items()]
    handles += [plt.Line2D([], [], color="#111111", marker=m, ls="", label=name) for name, m in _MARKERS.items()]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
