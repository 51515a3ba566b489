"""The report: what was coded, what was not and why, and the bytes that it came to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fewbit_fx.passes.record import GraphRecord, SiteRecord
from fewbit_fx.table import text_table

_COLUMNS = ("where", "sites", "function", "shape", "dtype", "what happened", "bytes before", "after", "rel. error")
_RIGHT_ALIGNED = {"sites", "bytes before", "after", "rel. error"}


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
        return 1 - self.fewbit_bytes / self.plain_bytes if self.plain_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain dictionaries, lists, numbers and text (JSON-ready)."""
        totals = {"plain_bytes": self.plain_bytes, "fewbit_bytes": self.fewbit_bytes, "saving": self.saving}
        return {**totals, "graphs": [dataclasses.asdict(graph) for graph in self.graphs]}

    def __str__(self) -> str:
        if not self.graphs:
            return "fewbit: no graph with a backward has been compiled yet"
        return "\n\n".join([*map(_graph_text, self.graphs), self._totals()])

    def _totals(self) -> str:
        return (
            f"bytes saved for backward: torch.compile {self.plain_bytes:,}   fewbit {self.fewbit_bytes:,}   "
            f"({-self.saving:+.1%})"
        )


def _graph_text(graph: GraphRecord) -> str:
    lines = [f"graph {graph.compile_id}" + (f": {graph.note}" if graph.note else "")]
    if graph.sites:
        groups = _grouped(graph.sites)
        reasons = list(dict.fromkeys(site.reason for site, _ in groups if site.reason))
        lines += text_table(_COLUMNS, (_row(site, where, reasons) for site, where in groups), _RIGHT_ALIGNED)
        lines += [f"  [{i}] left exact, because {reason}" for i, reason in enumerate(reasons, 1)]
    elif not graph.note:
        lines.append("  no pointwise nonlinearity and no mask found")
    return "\n".join(lines)


def _grouped(sites: Iterable[SiteRecord]) -> list[tuple[SiteRecord, list[str]]]:
    """Sites that differ only in the numbers of their modules, as layers do, with their modules."""
    groups: dict[SiteRecord, tuple[SiteRecord, list[str]]] = {}
    for site in sites:
        pattern = re.sub(r"\d+", "*", site.module)
        _, modules = groups.setdefault(dataclasses.replace(site, module=pattern), (site, []))
        modules.append(site.module)
    return list(groups.values())


def _row(site: SiteRecord, modules: list[str], reasons: list[str]) -> tuple[str, ...]:
    count = len(modules)
    return (
        _where(site, modules),
        str(count),
        site.function,
        "x".join(map(str, site.shape)) or "scalar",
        site.dtype,
        site.action + (f" [{reasons.index(site.reason) + 1}]" if site.reason else ""),
        f"{count * site.bytes_before:,}",
        f"{count * site.bytes_after:,}",
        f"{site.relative_error:.2%}" if site.relative_error else "exact",
    )


def _where(site: SiteRecord, modules: list[str]) -> str:
    distinct = len(set(modules)) > 1
    module = re.sub(r"\d+", "*", site.module) if distinct else site.module
    file = site.source_line.replace("\\", "/").rsplit("/", 1)[-1]
    return " ".join(part for part in (module, f"({file})" if file else "") if part) or "-"
