"""The table of one graph: its records in few rows, in words for people."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fewbit_fx.passes.record import GraphRecord, OtherRecord, SiteRecord
from fewbit_fx.reporting.by_module import pattern
from fewbit_fx.reporting.text_table import text_table
from fewbit_fx.reporting.words import action, because

_COLUMNS = ("where", "count", "function", "shape", "dtype", "what happened", "bytes before", "after", "rel. error")
_RIGHT_ALIGNED = {"count", "bytes before", "after", "rel. error"}
_SMALL = "it has fewer elements than min_numel"

# What an operation of the backward is, by a part of its name; the first that fits.
_KINDS = (
    ("attention", "attention"),
    ("norm", "norm"),
    ("conv", "convolution"),
    ("mm", "matrix product"),
    ("loss", "loss"),
    ("softmax", "softmax"),
    ("pool", "pooling"),
    ("embedding", "indexing"),
    ("index", "indexing"),
    ("gather", "indexing"),
    ("scatter", "indexing"),
)
_OTHER = "other operations"

AnyRecord = TypeVar("AnyRecord", SiteRecord, OtherRecord)


@dataclass(frozen=True)
class _Row:
    """Records that print as one row.

    Attributes:
        records: Equal in what the row says of them.
        what: What the records are, or are for.
        action: What happened to the records.
        reason: Why, or "".
        relative_error: The error of each record.
    """

    records: Sequence[SiteRecord | OtherRecord]
    what: str
    action: str
    reason: str = ""
    relative_error: float = 0.0

    def cells(self, reasons: Sequence[str]) -> tuple[str, ...]:
        """The row's texts, with the reason's number in a list."""
        number = f" [{reasons.index(self.reason) + 1}]" if self.reason else ""
        return (
            _where(self.records),
            str(len(self.records)),
            self.what,
            _one_or_many((_shape(r) for r in self.records), "shapes"),
            _one_or_many((r.dtype for r in self.records), "dtypes"),
            self.action + number,
            f"{sum(r.bytes_before for r in self.records):,}",
            f"{sum(r.bytes_after for r in self.records):,}",
            f"{self.relative_error:.2%}" if self.relative_error else "exact",
        )


@dataclass(frozen=True)
class GraphTable:
    """What a report shows of one graph.

    Attributes:
        title: The graph's id, and how it was cut.
        rows: The texts of each row, in the order of ``columns``.
        notes: Below the table, in order.
    """

    title: str
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str]

    columns = _COLUMNS
    right_aligned = _RIGHT_ALIGNED


def graph_table(graph: GraphRecord) -> GraphTable:
    """The table of one graph: its sites by kind, codes by place too, then all else that is saved by what reads it."""
    rows = [_site_row(group) for group in _grouped(graph.sites, _site_kind)]
    others = [_other_row(group) for group in _grouped(graph.others, _other_kind)]
    rows += sorted(others, key=lambda row: -sum(r.bytes_before for r in row.records))
    reasons = list(dict.fromkeys(row.reason for row in rows if row.reason))
    return GraphTable(
        f"graph {graph.compile_id}{_about(graph)}",
        [row.cells(reasons) for row in rows],
        [f"[{i}] left exact, because {reason}" for i, reason in enumerate(reasons, 1)],
    )


def graph_lines(graph: GraphRecord) -> list[str]:
    """The table of one graph as lines of text."""
    table = graph_table(graph)
    lines = [table.title]
    if not graph.sites and not graph.note:
        lines.append("  no pointwise nonlinearity and no mask found")
    if table.rows:
        lines += text_table(table.columns, table.rows, table.right_aligned)
    return lines + [f"  {note}" for note in table.notes]


def _about(graph: GraphRecord) -> str:
    if graph.note:
        return f": left exact, because {because(graph.note)}"
    again = ", pointwise operations computed again in the backward" if graph.computes_again else ""
    return f": recipe {graph.recipe}{again}" if graph.recipe else ""


def _grouped(records: Iterable[AnyRecord], kind: Callable[[AnyRecord], Hashable]) -> list[list[AnyRecord]]:
    groups: dict[Hashable, list[AnyRecord]] = {}
    for record in records:
        groups.setdefault(kind(record), []).append(record)
    return list(groups.values())


def _site_kind(site: SiteRecord) -> Hashable:
    """Layers differ in the numbers of their modules and in widths. Of what is left exact the place matters less."""
    if site.reason and site.small:
        return ()
    place = () if site.reason else (pattern(site.module), site.source_line)
    return *place, site.function, site.dtype, action(site), site.reason, site.relative_error


def _site_row(sites: Sequence[SiteRecord]) -> _Row:
    first, reasons = sites[0], {because(site.reason) for site in sites}
    reason = reasons.pop() if len(reasons) == 1 else _SMALL
    return _Row(
        sites, _one_or_many((s.function for s in sites), "functions"), action(first), reason, first.relative_error
    )


def _other_kind(other: OtherRecord) -> Hashable:
    return _reading(other), _fate(other)


def _other_row(others: Sequence[OtherRecord]) -> _Row:
    return _Row(others, _reading(others[0]), _fate(others[0]))


def _reading(other: OtherRecord) -> str:
    """What the tensor is saved for, such as ``for matrix product, norm``."""
    if other.small:
        return "small tensors"
    if not other.dtype:
        return "everything"  # of a graph that was not looked at
    kinds = sorted({_kind(reader) for reader in other.readers})
    return "for " + (", ".join(kind for kind in kinds if kind != _OTHER) or _OTHER)


def _kind(operation: str) -> str:
    return next((kind for part, kind in _KINDS if part in operation), _OTHER)


def _fate(other: OtherRecord) -> str:
    if not other.bytes_after:
        return "computed again, or no longer read"
    return "saved as it is" if other.bytes_before else "saved in place of others"


def _shape(record: SiteRecord | OtherRecord) -> str:
    return "x".join(map(str, record.shape)) or ("scalar" if record.dtype else "")


def _where(records: Sequence[SiteRecord | OtherRecord]) -> str:
    modules = {r.module for r in records}
    places = {(pattern(r.module), r.source_line) for r in records}
    if len(places) > 1:
        return f"{len(places)} places"
    ((path, source_line),) = places
    file = source_line.replace("\\", "/").rsplit("/", 1)[-1]
    module = modules.pop() if len(modules) == 1 else path
    return " ".join(part for part in (module, f"({file})" if file else "") if part) or "-"


def _one_or_many(texts: Iterable[str], plural: str) -> str:
    """The text that all agree on, or how many there are."""
    distinct = set(texts)
    return distinct.pop() if len(distinct) == 1 else f"{len(distinct)} {plural}"
