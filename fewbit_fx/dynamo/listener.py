"""What a compilation leaves behind: its records, lines in torch's log, and artifacts that tlparse shows."""

from __future__ import annotations

import functools
import logging

from fewbit_fx.dynamo.record_file import RecordFile
from fewbit_fx.passes.pipeline import Work
from fewbit_fx.passes.record import GraphRecord
from fewbit_fx.reporting.report import Report
from fewbit_fx.reporting.words import action, because
from fewbit_fx.torch_private.tracing import artifact

logger = logging.getLogger("fewbit_fx")


class Listener:
    """Hears of each graph that a partitioner partitions.

    Attributes:
        records: The records of the graphs, in the order of their compilation.
        file: Where they are kept for processes that find the graphs compiled; None for nowhere.
    """

    def __init__(self) -> None:
        self.records: list[GraphRecord] = []
        self.file: RecordFile | None = None

    def observe(self, work: Work) -> None:
        """Leave the graphs before and after as artifacts, with the environment's TORCH_TRACE."""
        graphs = {"forward_before": work.plain.forward, "backward_before": work.plain.backward}
        if work.chosen is not work.plain:
            graphs |= {"forward_after": work.chosen.forward, "backward_after": work.chosen.backward}
        for name, graph in graphs.items():
            artifact(f"fewbit_{name}", functools.partial(graph.print_readable, print_output=False))

    def record(self, record: GraphRecord) -> None:
        """Keep a record; leave it as an artifact, and its decisions in the log.

        It is in the file before torch's caches have the graph: whoever finds the one finds the other, although a
        process may be killed at any time.
        """
        self.records.append(record)
        if self.file:
            self.file.write(self.records)
        artifact("fewbit_report", lambda: str(Report((record,))))
        _log(record)


def _log(record: GraphRecord) -> None:
    """A line per decision, for ``TORCH_LOGS="+fewbit_fx"``."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    for site in record.sites:
        why = f", because {because(site.reason)}" if site.reason else ""
        where = site.module or site.source_line or "-"
        logger.debug("graph %s: %s %s: %s%s", record.compile_id, where, site.function, action(site), why)
    logger.debug(
        "graph %s: %d bytes saved instead of %d; %.3f s (%s)",
        record.compile_id,
        record.fewbit_bytes,
        record.plain_bytes,
        record.pass_seconds,
        ", ".join(f"{name} {seconds:.3f}" for name, seconds in record.pass_times),
    )
