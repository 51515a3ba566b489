"""The report: what was coded, what was not and why, and the bytes that it came to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fewbit_fx.passes.record import GraphRecord, OtherRecord, SiteRecord
from fewbit_fx.report_table import graph_lines


@dataclass(frozen=True)
class Report:
    """What fewbit did to a model's graphs. ``print`` it, or take :meth:`to_dict`.

    Attributes:
        graphs: One record per compiled graph (graph breaks make several).
    """

    graphs: tuple[GraphRecord, ...]

    @property
    def sites(self) -> tuple[SiteRecord, ...]:
        """All sites of all graphs."""
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def rows(self) -> tuple[SiteRecord | OtherRecord, ...]:
        """All that is saved, sites first; the bytes of these rows sum to the report's totals."""
        return self.sites + tuple(other for graph in self.graphs for other in graph.others)

    @property
    def plain_bytes(self) -> int:
        """Bytes saved for the backward under plain torch.compile, without parameters and buffers."""
        return sum(graph.plain_bytes for graph in self.graphs)

    @property
    def fewbit_bytes(self) -> int:
        """The same under fewbit."""
        return sum(graph.fewbit_bytes for graph in self.graphs)

    @property
    def saving(self) -> float:
        """Share of ``plain_bytes`` that fewbit does not save for the backward, 0 to 1."""
        return _saving(self.plain_bytes, self.fewbit_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain dictionaries, lists, numbers and text (JSON-ready)."""
        totals = {"plain_bytes": self.plain_bytes, "fewbit_bytes": self.fewbit_bytes, "saving": self.saving}
        return {**totals, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        if not self.graphs:
            return "fewbit: no graph with a backward has been compiled yet"
        graphs = ["\n".join(graph_lines(graph)) for graph in self.graphs]
        return "\n\n".join([*graphs, f"bytes saved for backward: {_totals(self.plain_bytes, self.fewbit_bytes)}"])


def _saving(plain_bytes: int, fewbit_bytes: int) -> float:
    return 1 - fewbit_bytes / plain_bytes if plain_bytes else 0.0


def _totals(plain_bytes: int, fewbit_bytes: int) -> str:
    change = 0 - _saving(plain_bytes, fewbit_bytes)  # not minus zero
    return f"torch.compile {plain_bytes:,}   fewbit {fewbit_bytes:,}   ({change:+.1%})"
