"""A drawing of a report: what each module saves, with and without fewbit. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fewbit_fx.reporting.by_module import ModuleBytes

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def plot_modules(title: str, modules: Sequence[ModuleBytes]) -> Figure:
    """Two bars for each module: torch.compile's and fewbit's.

    Args:
        title: Above the figure.
        modules: The most important first.
    """
    size, unit = next((s, u) for s, u in _UNITS if s <= max([1, *(m.plain_bytes for m in modules)]))
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(8, 1.2 + 0.42 * len(modules)), layout="constrained")
        axes = figure.subplots()
        places = range(len(modules))
        plain, fewbit = ([getattr(m, name) / size for m in modules] for name in ("plain_bytes", "fewbit_bytes"))
        axes.barh([p - 0.2 for p in places], plain, 0.38, color="0.75", label="torch.compile")
        axes.barh([p + 0.2 for p in places], fewbit, 0.38, color="tab:orange", label="fewbit")
        axes.set_yticks(places, [m.name for m in modules])
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(f"saved for backward, {unit}")
        figure.suptitle(title, x=0.01, ha="left")
        axes.legend(frameon=False, loc="lower right")
    return figure
