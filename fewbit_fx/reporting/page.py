"""A report as one page of HTML that needs no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fewbit_fx.reporting.by_module import ModuleBytes
from fewbit_fx.reporting.graph_table import GraphTable

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.35rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
th { font-weight: 600; background: #f6f6f6 }
.right { text-align: right; font-variant-numeric: tabular-nums }
.bar { min-width: 16rem; width: 40% }
.plain { background: #c8c8c8; height: 1rem } .fewbit { background: #e8730c; height: 1rem }
.note { color: #555; font-size: .85rem; margin: .2rem 0 }
"""


def html_page(title: str, modules: Sequence[ModuleBytes], graphs: Sequence[GraphTable], meaning: str) -> str:
    """The page.

    Args:
        title: Its heading.
        modules: For which bars are drawn, the most important first.
        graphs: Their tables.
        meaning: What the columns mean, or "".
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        '<p class="note">Grey: what torch.compile saves. Orange: what is left of it with fewbit.</p>',
        *_bars(modules),
        *(part for graph in graphs for part in _graph(graph)),
        f'<p class="note">{escape(meaning)}</p>' if meaning else "",
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    lines = ['<!doctype html><html lang="en">', f"<head>{head}</head>", "<body>", *parts, "</body></html>", ""]
    return "\n".join(lines)


def _bars(modules: Sequence[ModuleBytes]) -> list[str]:
    """A table of the modules, with a grey bar that is as long as what torch.compile saves."""
    most = max((max(m.plain_bytes, m.fewbit_bytes) for m in modules), default=1)
    rows = [(escape(m.name), f"{m.plain_bytes:,}", f"{m.fewbit_bytes:,}", _bar(m, most)) for m in modules]
    return _table(("module", "torch.compile, bytes", "fewbit, bytes", ""), rows, {1, 2})


def _bar(module: ModuleBytes, most: int) -> str:
    outer, inner = (100 * size / most for size in (module.plain_bytes, module.fewbit_bytes))
    within = f"{100 * inner / outer:.1f}%" if outer else "0"
    return f'<div class="plain" style="width:{outer:.1f}%"><div class="fewbit" style="width:{within}"></div></div>'


def _graph(graph: GraphTable) -> list[str]:
    right = {i for i, column in enumerate(graph.columns) if column in graph.right_aligned}
    rows = [tuple(map(escape, row)) for row in graph.rows]
    notes = [f'<p class="note">{escape(note)}</p>' for note in graph.notes]
    return [f"<h2>{escape(graph.title)}</h2>", *_table(graph.columns, rows, right), *notes]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: set[int]) -> list[str]:
    """A table. The cells of ``rows`` are HTML; those of the columns ``right`` are aligned to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        classes = ["right" if i in right else "bar" if "<div" in cell else "" for i, cell in enumerate(cells)]
        return "".join(
            f'<{tag} class="{c}">{cell}</{tag}>' if c else f"<{tag}>{cell}</{tag}>"
            for c, cell in zip(classes, cells, strict=True)
        )

    body = [f"<tr>{line(row, 'td')}</tr>" for row in rows]
    return ['<div class="scroll"><table>', f"<tr>{line(head, 'th')}</tr>", *body, "</table></div>"]
