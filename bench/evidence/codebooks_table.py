"""The table of codebooks: the error of f' by each way of levels, over how widely x is distributed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.evidence.codebooks import SPREADS
from bench.result_file import File, markdown, measured_with


def lines(files: Sequence[File]) -> Iterator[str]:
    """A row for each function, number of bits and way of levels; bold: the least of a function and number of bits."""
    (file,) = files
    rows = file.data["result"]
    least = {
        (row["function"], row["bits"]): [
            min(other["errors"][i] for other in _like(rows, row)) for i in range(len(SPREADS))
        ]
        for row in rows
    }
    head = ["relative error of f'", "levels", *(f"N(0, {spread:g})" for spread in SPREADS)]
    yield from markdown(
        head,
        *(
            [
                f"{row['function'].upper().replace('SILU', 'SiLU')}, {row['bits']} bit{'s' * (row['bits'] > 1)}",
                row["levels"],
                *map(_cell, row["errors"], least[row["function"], row["bits"]]),
            ]
            for row in rows
        ),
    )
    yield f"\n<sub>Bold: the least. {measured_with(files)}.</sub>"


def _like(rows: Sequence[dict], row: dict) -> list[dict]:  # type: ignore[type-arg]
    return [other for other in rows if (other["function"], other["bits"]) == (row["function"], row["bits"])]


def _cell(error: float, least: float) -> str:
    text = f"{100 * error:.1f} %"
    return f"**{text}**" if error <= least else text
