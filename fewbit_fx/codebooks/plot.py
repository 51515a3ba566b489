"""A drawing of a codebook. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from fewbit_fx.codebooks.fitting import Array, Codebook
from fewbit_fx.codebooks.sampling import Sample


def plot_codebook(title: str, book: Codebook, sample: Sample, path: Path) -> None:
    """Draw a derivative with its levels, and the error below, over the interval where the sampled x are dense.

    Args:
        title: Above the figure.
        book: The codebook.
        sample: x and f'(x).
        path: The file of the image; its suffix chooses the format.
    """
    order = np.argsort(sample.x)
    order = order[_is_dense(sample.x[order], sample.weights[order])]
    x, exact = sample.x[order], sample.values[order]
    coded = book.nearest(exact)
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(8, 6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for level in book.levels:
            top.axhline(level, color="0.85", linewidth=0.8, zorder=0)
        top.plot(x, exact, color="0.3", linewidth=1.2, label="f'(x)")
        top.plot(x, coded, color="tab:orange", linewidth=1.6, label="level")
        top.set_title(f"{title}: relative error {book.relative_error:.2%}", loc="left")
        top.legend(frameon=False)
        bottom.fill_between(x, coded - exact, color="tab:orange", alpha=0.5, linewidth=0)
        bottom.set_ylabel("error")
        bottom.set_xlabel("x")
        figure.savefig(path, dpi=150)


def _is_dense(x: Array, weights: Array) -> npt.NDArray[np.bool_]:
    """Whether x, ascending, lies within one and a half times the interval that holds 95 % of the weight."""
    low, high = x[np.minimum(np.searchsorted(np.cumsum(weights), (0.025, 0.975)), len(x) - 1)]
    return np.asarray(np.abs(x - (low + high) / 2) <= 0.75 * (high - low), dtype=np.bool_)
