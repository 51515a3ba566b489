"""Records of compiled graphs, kept for a later report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fewbit_fx.passes.record import GraphRecord
from fewbit_fx.report import Report


class History:
    """The latest records of each graph; a recompilation for other shapes replaces its predecessor."""

    def __init__(self) -> None:
        self._records: dict[object, tuple[GraphRecord, ...]] = {}

    def add(self, identity: object, records: Iterable[GraphRecord]) -> None:
        """Remember the records of one compiled graph."""
        self._records.pop(identity, None)  # the latest comes last
        self._records[identity] = tuple(records)

    def report(self) -> Report:
        """A report of all that is remembered."""
        return Report(tuple(record for records in self._records.values() for record in records))


def graph_identity(gm: fx.GraphModule, example_inputs: Sequence[Any], compile_id: str) -> object:
    """Equal for compilations of one model's graph, whatever the shapes of its inputs.

    Models of one class share a frame of Dynamo's; their operations and parameters tell them apart.
    """
    operations = tuple(str(n.target) for n in gm.graph.nodes if n.op.startswith("call_"))
    parameters = tuple(tuple(p.shape) for p in example_inputs if isinstance(p, Tensor) and isinstance(p, nn.Parameter))
    return compile_id.split("/")[0], operations, parameters
