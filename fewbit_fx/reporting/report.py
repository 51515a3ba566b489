"""The report: what was coded, what was not and why, and the bytes that it came to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit_fx.passes.record import GraphRecord, OtherRecord
from fewbit_fx.reporting.by_module import ModuleBytes, bar_lines, bytes_by_module, with_the_rest_as_one
from fewbit_fx.reporting.graph_table import graph_lines, graph_table
from fewbit_fx.reporting.page import html_page
from fewbit_fx.reporting.words import ReportedSite, because, in_words

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.figure import Figure

_MODULES_IN_TEXT, _MODULES_IN_PICTURES = 6, 20
_RELATIVE_ERROR = (
    "rel. error: root mean square of the error over that of f'(x), or of a value; a prediction, not measured on your\n"
    "data: for typical x, normal where f' varies and a few per cent beyond, and for values of a normal distribution"
)
_BARS = "bytes saved by module, before and after (# what fewbit saves, . what it does not)"


@dataclass(frozen=True)
class ModelTotals:
    """The bytes of another model, or of several models with equal bytes.

    Attributes:
        name: Class of the module, or name of the function, that was compiled.
        plain_bytes: Bytes saved for the backward of one under plain torch.compile.
        fewbit_bytes: Bytes saved for the backward of one under fewbit.
        count: How many models.
    """

    name: str
    plain_bytes: int
    fewbit_bytes: int
    count: int = 1


@dataclass(frozen=True)
class Report:
    """What fewbit did to a model's graphs. ``print`` it, or take :meth:`to_dict`, :meth:`plot` or :meth:`to_html`.

    Attributes:
        graphs: One record per compiled graph (graph breaks make several).
        model: Class of the module, or name of the function, that was compiled; "" if not known.
        other_models: What was compiled before this model, in order.
    """

    graphs: tuple[GraphRecord, ...]
    model: str = ""
    other_models: tuple[ModelTotals, ...] = ()

    @property
    def sites(self) -> tuple[ReportedSite, ...]:
        """All sites of all graphs, with what happened and why in words."""
        return tuple(in_words(site) for graph in self.graphs for site in graph.sites)

    @property
    def rows(self) -> tuple[ReportedSite | OtherRecord, ...]:
        """All that is saved, sites first; the bytes of these rows sum to the report's totals."""
        return self.sites + tuple(other for graph in self.graphs for other in graph.others)

    @property
    def plain_bytes(self) -> int:
        """Bytes saved for the backward under plain torch.compile, without parameters and buffers."""
        return sum(graph.plain_bytes for graph in self.graphs)

    @property
    def fewbit_bytes(self) -> int:
        """Bytes saved for the backward under fewbit, without parameters and buffers."""
        return sum(graph.fewbit_bytes for graph in self.graphs)

    @property
    def saving(self) -> float:
        """Share of ``plain_bytes`` that fewbit does not save for the backward, 0 to 1."""
        return _saving(self.plain_bytes, self.fewbit_bytes)

    @property
    def modules(self) -> tuple[ModuleBytes, ...]:
        """The saved bytes by module, equal layers as one, the most first; they sum to the report's totals."""
        return tuple(bytes_by_module(row for graph in self.graphs for row in graph.rows))

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain dictionaries, lists, numbers and text (JSON-ready)."""
        totals = {"plain_bytes": self.plain_bytes, "fewbit_bytes": self.fewbit_bytes, "saving": self.saving}
        graphs = [_graph_dict(graph) for graph in self.graphs]
        return {**totals, **dataclasses.asdict(self), "graphs": graphs}

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the saved bytes of each module under torch.compile and under fewbit.

        Args:
            path: A file to write, whose suffix chooses the format; None writes none.

        Returns:
            A figure of matplotlib, which a notebook shows.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from fewbit_fx.reporting.plot import plot_modules
        except ModuleNotFoundError as missing:
            raise ModuleNotFoundError(f"plot() needs {missing.name}: pip install 'fewbit-fx[plot]'") from missing
        title = f"{self.model or 'model'}: saved for backward {0 - self.saving:+.1%}"
        figure = plot_modules(title, with_the_rest_as_one(self.modules, _MODULES_IN_PICTURES))
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one page of HTML that needs no other file, with bars for the modules.

        Args:
            path: A file to write too; None writes none.
        """
        modules = with_the_rest_as_one(self.modules, _MODULES_IN_PICTURES)
        page = html_page(self._title(), modules, [graph_table(graph) for graph in self.graphs], self._meaning())
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def _title(self) -> str:
        return f"{self.model or 'model'}: saved for backward, {_totals(self.plain_bytes, self.fewbit_bytes)}"

    def _meaning(self) -> str:
        return _RELATIVE_ERROR if any(site.relative_error for site in self.sites) else ""

    def __str__(self) -> str:
        if not self.graphs:
            return "fewbit: no graph with a backward has been compiled yet"
        head = [f"model {self.model}"] if self.model else []
        graphs = ["\n".join(graph_lines(graph)) for graph in self.graphs]
        totals = f"bytes saved for backward: {_totals(self.plain_bytes, self.fewbit_bytes)}"
        before = [f"compiled before: {_model(m)} {_totals(m.plain_bytes, m.fewbit_bytes)}" for m in self.other_models]
        modules = with_the_rest_as_one(self.modules, _MODULES_IN_TEXT)
        bars = ["\n".join([_BARS, *bar_lines(modules)])] if len(modules) > 1 else []
        meaning = [text] if (text := self._meaning()) else []
        return "\n\n".join([*head, *graphs, *bars, "\n".join([*meaning, totals, *before])])


def _graph_dict(graph: GraphRecord) -> dict[str, Any]:
    """A graph's data. ``reason`` and ``note`` are sentences, and ``cause`` is what a program should compare."""
    sites = [dataclasses.asdict(in_words(site)) for site in graph.sites]
    return {
        **dataclasses.asdict(graph),
        "sites": sites,
        "note": because(graph.note),
        "pass_times": dict(graph.pass_times),
    }


def _saving(plain_bytes: int, fewbit_bytes: int) -> float:
    return 1 - fewbit_bytes / plain_bytes if plain_bytes else 0.0


def _totals(plain_bytes: int, fewbit_bytes: int) -> str:
    change = 0 - _saving(plain_bytes, fewbit_bytes)  # not minus zero
    return f"torch.compile {plain_bytes:,}   fewbit {fewbit_bytes:,}   ({change:+.1%})"


def _model(totals: ModelTotals) -> str:
    return f"{totals.name}:" if totals.count == 1 else f"{totals.name}, {totals.count} of them, each:"
