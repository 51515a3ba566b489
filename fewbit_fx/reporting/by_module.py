"""Saved bytes by the module that made them, with equal layers as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fewbit_fx.passes.record import OtherRecord, SiteRecord
from fewbit_fx.reporting.text_table import text_table

_BAR = 30  # characters of the longest bar


@dataclass(frozen=True)
class ModuleBytes:
    """The bytes that modules of one path, but for numbers, have saved for the backward.

    Attributes:
        path: Of the modules, such as ``layers.*.mlp``; "" for the model itself and its inputs.
        count: How many modules these are.
        plain_bytes: Bytes saved of all of them under plain torch.compile.
        fewbit_bytes: The same under fewbit.
    """

    path: str
    count: int
    plain_bytes: int
    fewbit_bytes: int

    @property
    def name(self) -> str:
        """The path, and how often it occurs."""
        path = self.path or "the model itself"
        return path if self.count == 1 else f"{path} ({self.count})"


def pattern(module: str) -> str:
    """The path of a module with its numbers as ``*``: layers differ in these."""
    return re.sub(r"\d+", "*", module)


def bytes_by_module(rows: Iterable[SiteRecord | OtherRecord]) -> list[ModuleBytes]:
    """The bytes of rows by module, the most first; they sum to those of the rows."""
    groups: dict[str, list[SiteRecord | OtherRecord]] = {}
    for row in rows:
        groups.setdefault(pattern(row.module), []).append(row)
    modules = [
        ModuleBytes(
            path, len({r.module for r in group}), sum(r.bytes_before for r in group), sum(r.bytes_after for r in group)
        )
        for path, group in groups.items()
    ]
    return sorted((m for m in modules if m.plain_bytes or m.fewbit_bytes), key=_most)


def with_the_rest_as_one(modules: Sequence[ModuleBytes], shown: int) -> list[ModuleBytes]:
    """The first modules, and the sum of all others as one."""
    if len(modules) <= shown:
        return list(modules)
    first, rest = modules[: shown - 1], modules[shown - 1 :]
    paths = f"{len(rest)} others"
    return [*first, ModuleBytes(paths, 1, sum(m.plain_bytes for m in rest), sum(m.fewbit_bytes for m in rest))]


def bar_lines(modules: Sequence[ModuleBytes]) -> list[str]:
    """A line for each module, with a bar: ``#`` is what fewbit saves, ``.`` what it does not."""
    largest = max(max(m.plain_bytes, m.fewbit_bytes) for m in modules)
    rows = [(m.name, f"{m.plain_bytes:,}", f"{m.fewbit_bytes:,}", _bar(m, largest)) for m in modules]
    _, *lines = text_table(
        ("", "before", "after", ""), rows, right=("before", "after")
    )  # whoever prints it has a title
    return lines


def _bar(module: ModuleBytes, largest: int) -> str:
    after = round(_BAR * module.fewbit_bytes / largest)
    return "#" * after + "." * (round(_BAR * module.plain_bytes / largest) - after)


def _most(module: ModuleBytes) -> tuple[int, str]:
    return -module.plain_bytes, module.path
