"""Compare our codebooks with those that the paper's library ships, function by function.

python -m bench.codebooks --reference fewbit_builtin.npz

The error is that of the derivative, with uniform weight on [-100, 100], as that library's are fitted.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fewbit_fx
from bench.measure import conditions
from fewbit_fx.codebooks.activations import ACTIVATIONS, derivative_of
from fewbit_fx.codebooks.density import Uniform

Array = npt.NDArray[np.float64]

WINDOW = 100.0
BITS = (1, 2, 3, 4)
_CELLS = 2_000_000


@dataclass(frozen=True)
class Comparison:
    """One function at one number of bits.

    Attributes:
        relative_error: Root mean square of our error over that of f', on the window.
        squared_error: Integral of our squared error over the window.
        reference_relative_error, reference_squared_error: The same of the reference, or None.
    """

    function: str
    bits: int
    relative_error: float
    squared_error: float
    reference_relative_error: float | None
    reference_squared_error: float | None

    @property
    def ratio(self) -> float | None:
        """The reference's squared error over ours."""
        return None if self.reference_squared_error is None else self.reference_squared_error / self.squared_error


def compare(functions: Sequence[str], reference: Mapping[str, Array]) -> Iterator[Comparison]:
    """A comparison for each function and number of bits; reference errors where the reference has them."""
    width = 2 * WINDOW / _CELLS
    x = (np.arange(_CELLS) + 0.5) * width - WINDOW
    for name in functions:
        exact = derivative_of(ACTIVATIONS[name])(x)
        power = float(np.sum(exact**2)) * width
        for bits in BITS:
            book = fewbit_fx.codebook(name, bits, Uniform(-WINDOW, WINDOW))
            error = float(np.sum((book.nearest(exact) - exact) ** 2)) * width
            theirs = _reference_error(reference, f"{name}{bits:02d}", x, exact)
            shipped = None if theirs is None else theirs * width
            relative = None if shipped is None else math.sqrt(shipped / power)
            yield Comparison(name, bits, math.sqrt(error / power), error, relative, shipped)


def _reference_error(reference: Mapping[str, Array], key: str, x: Array, exact: Array) -> float | None:
    """Sum of the squared error of a shipped codebook, whose levels belong to intervals of x."""
    if f"{key}-levels" not in reference:
        return None
    borders, levels = reference[f"{key}-borders"], reference[f"{key}-levels"]
    coded = levels[np.searchsorted(borders[1:-1], x, side="right")]
    return float(np.sum((coded - exact) ** 2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, compare, and show."""
    parser = argparse.ArgumentParser(prog="bench.codebooks", description=__doc__)
    parser.add_argument("--reference", type=Path, help="fewbit_builtin.npz; without it, only our own errors are shown")
    parser.add_argument("--output", type=Path, default=Path("codebooks"), help="PATH.json and PATH.md")
    flags = parser.parse_args(arguments)
    reference = dict(np.load(flags.reference)) if flags.reference else {}
    functions = [name for name in ACTIVATIONS if name not in ("squared relu", "exp", "square")]  # unbounded
    about = conditions(torch.device("cpu"), ["uniform weight on [-100, 100]"])
    found = list(track(compare(functions, reference), "fitting", total=len(functions) * len(BITS)))
    table = _markdown(found)
    flags.output.with_suffix(".md").write_text(table)
    data = {"conditions": about, "summary": summary(found), "comparisons": [asdict(c) for c in found]}
    flags.output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    console = Console()
    console.print(_table(found))
    console.print("  ".join(f"[dim]{k}:[/] {v}" for k, v in {**about, **summary(found)}.items()))
    console.print(f"wrote {flags.output.with_suffix('.md')} and {flags.output.with_suffix('.json')}")


def summary(found: Sequence[Comparison]) -> dict[str, float]:
    """Cases compared, the geometric mean of reference / ours, and the least of it."""
    ratios = [c.ratio for c in found if c.ratio is not None]
    if not ratios:
        return {"cases": 0}
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return {"cases": len(ratios), "geometric mean of reference / ours": mean, "least": min(ratios)}


_HEAD = (
    "function",
    "bits",
    "relative error",
    "squared L2 error",
    "reference: relative",
    "squared L2",
    "reference / ours",
)


def _cells(c: Comparison) -> tuple[str, ...]:
    shipped, relative, ratio = c.reference_squared_error, c.reference_relative_error, c.ratio
    return (
        c.function,
        str(c.bits),
        f"{c.relative_error:.3%}",
        f"{c.squared_error:.3g}",
        "-" if relative is None else f"{relative:.3%}",
        "-" if shipped is None else f"{shipped:.3g}",
        "-" if ratio is None else f"{ratio:.2f}",
    )


def _markdown(found: Sequence[Comparison]) -> str:
    rows = [_HEAD, ("---",) * len(_HEAD), *map(_cells, found)]
    notes = "".join(f"- {k}: {v:.3g}\n" for k, v in summary(found).items())
    title = (
        "# Codebooks\n\nError of the derivative, uniform weight on [-100, 100], where ours are fitted for that weight "
        "too.\nMade by `python -m bench.codebooks --reference fewbit_builtin.npz`, the codebooks that the paper's "
        "library\n(skolai/fewbit) ships.\n\n"
    )
    return f"{title}{notes}\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _table(found: Sequence[Comparison]) -> Table:
    table = Table(*_HEAD, title="error of the derivative, uniform weight on [-100, 100]")
    for comparison in found:
        table.add_row(*_cells(comparison), end_section=comparison.bits == BITS[-1])
    return table


if __name__ == "__main__":
    main()
