"""A file of results, read again: its settings, its conditions and its command, to stand beneath a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class File:
    """One file of results."""

    name: str
    data: Mapping[str, Any]

    @property
    def conditions(self) -> Mapping[str, str]:
        """As :func:`bench.measure.conditions` has them; older files have fewer."""
        return self.data["conditions"]  # type: ignore[no-any-return]

    def setting(self, name: str, absent: str | None = None) -> str:
        """The value that the conditions' settings have for a name, such as ``400`` for ``steps``.

        Args:
            name: Of the setting.
            absent: What stands for it in files from before there was such a setting.
        """
        found = re.search(rf"\b{name} ([^,]+)", self.conditions["settings"])
        if found is None and absent is not None:
            return absent
        if found is None:
            raise ValueError(f"{self.name}: no {name} in its settings, {self.conditions['settings']!r}")
        return found[1]

    @property
    def command(self) -> str:
        """The command line that made it, without where to."""
        return re.sub(r" --output[ =]\S+", "", self.data["command"])


def markdown(*rows: Iterable[str]) -> Iterator[str]:
    """Lines of a table; the first row is its head."""
    head, *body = (list(row) for row in rows)
    for row in (head, ["---"] * len(head), *body):
        yield f"| {' | '.join(row)} |"


def measured_with(files: Iterable[File]) -> str:
    """What the files' conditions say, each value once: a line of text."""
    about = [file.conditions for file in files]

    def values(key: str) -> str:
        return " and ".join(sorted({each.get(key, "not recorded") for each in about}))

    return f"{values('device')}; torch {values('torch')}; {values('date')}; commit {values('commit')}"
