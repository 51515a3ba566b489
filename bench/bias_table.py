"""The README's table of bias and scatter: the recipes, and the classes of sites that they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.result_file import File, markdown, measured_with
from fewbit_fx.config import ROUNDINGS

_SHOWN = (
    ("derivatives", 3),
    ("values", 8),
    ("values", 6),
    ("norms", 8),
    ("softmax", 8),
    ("default", None),
    ("lean", None),
)


def lines(files: Sequence[File]) -> Iterator[str]:
    """A row for each setting of :data:`_SHOWN`, with a column for each model and rounding."""
    rows = [row for file in files for row in file.data["rows"]]
    found = {(row["model"], row["sites"], row["bits"], row["rounding"]): row for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))
    columns = [(model, rounding) for model in models for rounding in ROUNDINGS]
    head = "bias, scatter", *(f"{model}, {rounding}" for model, rounding in columns)
    cells = (
        [_name(sites, bits), *(_cell(found.get((model, sites, bits, rounding))) for model, rounding in columns)]
        for sites, bits in _SHOWN
    )
    yield from markdown(head, *cells)
    yield f"\n<sub>{measured_with(files)}; {files[0].conditions['settings']}.</sub>"


def _name(sites: str, bits: int | None) -> str:
    return f"recipe {sites}" if bits is None else f"{sites}, {bits} bits"


def _cell(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{100 * row['bias']:.2f} %, {100 * row['scatter']:.2f} %"
