"""Text tables without a dependency."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> list[str]:
    """Lines of a table with aligned columns.

    Args:
        head: Titles of the columns.
        rows: Cells, as many in each row as there are titles.
        right: Titles of the columns to align to the right.
    """
    cells = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(map(_aligned, head, row, widths, [right] * len(head))).rstrip() for row in cells]


def _aligned(title: str, text: str, width: int, right: Collection[str]) -> str:
    return text.rjust(width) if title in right else text.ljust(width)
