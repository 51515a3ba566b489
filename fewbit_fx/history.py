"""Records of compiled graphs, kept for a later report."""

from __future__ import annotations

from fewbit_fx.passes.record import GraphRecord
from fewbit_fx.report import Report


class History:
    """The latest record of each compiled frame; a recompilation replaces its predecessor."""

    def __init__(self) -> None:
        self._records: dict[str, GraphRecord] = {}

    def add(self, record: GraphRecord) -> None:
        frame = record.compile_id.split("/")[0]
        self._records.pop(frame, None)  # the latest comes last
        self._records[frame] = record

    def report(self) -> Report:
        return Report(tuple(self._records.values()))
