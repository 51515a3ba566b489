"""The picture of memory and time: a panel for each model, a marker for each method, the error as colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from bench.evidence.frontier import Point, frontier, points
from bench.evidence.methods import METHODS
from bench.result_file import File, measured_with

_COLUMNS = 3
_FASTEST, _SLOWEST = 0.8, 2.0  # what takes longer stands at the edge
_ERRORS = LogNorm(1e-3, 0.3)
_MAP = plt.get_cmap("plasma_r")
_EXACT = "#1f6f43"
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">", "h")


def save_plot(path: Path, files: Sequence[File]) -> None:
    """Draw into a PNG bytes held against time, of models measured with more than three methods, or of all."""
    found = points(files)
    chosen = [name for name, of_a_model in found.items() if len(of_a_model) > 3] or list(found)
    if not chosen:
        return  # as long as torch.compile's default has not been measured
    columns = min(_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    size = 3.6 * columns + 1.8, 3.3 * rows + 0.6
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    markers = _markers(found)
    for panel, name in zip(panels.flat, chosen, strict=False):
        _draw(panel, name, found[name], markers)
    for panel in panels.flat[len(chosen) :]:
        panel.set_visible(False)
    bar = figure.colorbar(plt.cm.ScalarMappable(_ERRORS, _MAP), ax=panels, shrink=0.6, aspect=30)
    bar.set_label("relative error of the gradient (green: exact)")
    handles = [plt.Line2D([], [], marker=m, color="#555555", ls="", label=family) for family, m in markers.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    what = "time of a step against bytes held from forward to backward, both of torch.compile's"
    figure.suptitle(f"{what}\n{measured_with(files)}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _markers(found: Mapping[str, Sequence[Point]]) -> dict[str, str]:
    present = {point.method for each in found.values() for point in each}
    families = dict.fromkeys(method.family for name, method in METHODS.items() if name in present)
    return dict(zip(families, _MARKERS, strict=False))


def _draw(axes: Axes, title: str, of_a_model: Sequence[Point], markers: Mapping[str, str]) -> None:
    best = frontier(of_a_model)
    axes.plot([p.held for p in best], [_height(p) for p in best], color="#bbbbbb", lw=1, zorder=0)
    for point in of_a_model:
        colour = _MAP(_ERRORS(point.error)) if point.error else _EXACT
        marker = markers[METHODS[point.method].family]
        edge = {"mec": "black", "mew": 1.0} if point in best else {"mec": "none"}
        axes.plot(point.held, _height(point), marker, color=colour, ms=8, **edge)
    for point in best:
        text = point.method.replace("derivatives, ", "")
        axes.annotate(text, (point.held, _height(point)), (4, 4), textcoords="offset points", fontsize=6)
    axes.axhline(1, color="#dddddd", lw=0.8, zorder=0)
    axes.set_title(title, fontsize=9)
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    axes.yaxis.set_major_formatter(lambda y, _: f"x {y:.1f}")
    axes.set_ylim(_FASTEST, _SLOWEST + 0.05)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _height(point: Point) -> float:
    return min(point.time, _SLOWEST)
