"""Reports for people: bytes by module as bars, a drawing and a page."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from fewbit_fx.passes.record import GraphRecord, OtherRecord
from fewbit_fx.reporting.by_module import ModuleBytes, bar_lines, with_the_rest_as_one
from fewbit_fx.reporting.report import Report

pytest.importorskip("matplotlib")


def row(module: str, before: int, after: int) -> OtherRecord:
    return OtherRecord(module, "model.py:1", ("mm",), (4, 8), "float32", before, after)


ROWS = (row("", 10, 10), row("layers.0.<mlp>", 300, 60), row("layers.1.<mlp>", 300, 30), row("head", 0, 40))
REPORT = Report((GraphRecord("0/0", 610, 140, (), others=ROWS),), "Model")


def test_modules_sum_to_the_totals_and_equal_layers_are_one() -> None:
    assert REPORT.modules == (
        ModuleBytes("layers.*.<mlp>", 2, 600, 90),
        ModuleBytes("", 1, 10, 10),
        ModuleBytes("head", 1, 0, 40),
    )
    assert sum(m.plain_bytes for m in REPORT.modules) == REPORT.plain_bytes
    assert sum(m.fewbit_bytes for m in REPORT.modules) == REPORT.fewbit_bytes


def test_what_is_not_shown_is_summed() -> None:
    shown = with_the_rest_as_one(REPORT.modules, 2)
    assert shown == [REPORT.modules[0], ModuleBytes("2 others", 1, 10, 50)]
    assert with_the_rest_as_one(REPORT.modules, 3) == list(REPORT.modules)


def test_bars_are_as_long_as_the_bytes() -> None:
    first, second, third = bar_lines(REPORT.modules)
    assert (first.count("#"), first.count(".") - "layers.*.<mlp>".count(".")) == (4, 26)  # 90 and 510 of 600, of 30
    assert first.split()[:4] == ["layers.*.<mlp>", "(2)", "600", "90"]
    assert second.split() == ["the", "model", "itself", "10", "10"]
    assert third.count("#") == 2
    assert first in str(REPORT)


def test_a_drawing_has_two_bars_for_each_module(tmp_path: Path) -> None:
    figure = REPORT.plot(tmp_path / "report.png")
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [600, 10, 0, 90, 10, 40]
    assert [label.get_text() for label in axes.get_yticklabels()] == [m.name for m in REPORT.modules]
    assert (tmp_path / "report.png").stat().st_size > 0


class Texts(HTMLParser):
    """The texts of a page, and its open tags."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_page_is_one_file_with_all_that_the_text_says(tmp_path: Path) -> None:
    page = REPORT.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    parser = Texts()
    parser.feed(page)
    assert parser.open == []
    for text in ("layers.*.<mlp> (2)", "600", "graph 0/0", "for matrix product", "saved as it is"):
        assert text in parser.texts
    assert "http" not in page, "nothing is loaded"


def test_a_report_of_nothing_has_a_drawing_and_a_page() -> None:
    assert Report(()).plot().axes
    assert "saved for backward" in Report(()).to_html()
