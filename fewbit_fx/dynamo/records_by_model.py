"""Records of compiled graphs, kept by model for a later report."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from fewbit_fx.function_cache import is_weakly_referable, owner_of
from fewbit_fx.passes.record import GraphRecord, SiteRecord
from fewbit_fx.reporting.report import ModelTotals, Report


class History:
    """The latest records of each graph of each model; a recompilation for other shapes replaces its predecessor.

    Models are referred to weakly. Of one that is gone the totals are kept once another follows.
    """

    def __init__(self) -> None:
        self._models: list[_Model] = []
        self._gone: Counter[ModelTotals] = Counter()

    def __reduce__(self) -> tuple[type[History], tuple[()]]:
        """A copy, as of a compiled model that is pickled, begins anew: it will compile models of its own."""
        return History, ()

    def add(self, compiled: Callable[..., Any] | None, identity: object, records: Iterable[GraphRecord]) -> None:
        """Remember the records of one compiled graph. One without a backward has none, and changes nothing.

        Args:
            compiled: What was handed to torch.compile, None if not known. A method belongs to its object.
            identity: What tells the graph from others of its model.
            records: What the passes did to it.
        """
        records = tuple(records)
        if not records:
            return
        owner = None if compiled is None else owner_of(compiled)
        model = next((m for m in self._models if m.is_of(owner)), None) or _Model.of(owner)
        model.records.pop(identity, None)  # the latest comes last
        model.records[identity] = records
        others = [m for m in self._models if m is not model]
        self._gone.update(m.totals() for m in others if m.is_gone())
        self._models = [*(m for m in others if not m.is_gone()), model]

    def sites(self) -> tuple[SiteRecord, ...]:
        """The sites of all models, in the order in which they were compiled."""
        return tuple(site for model in self._models for graph in model.graphs() for site in graph.sites)

    def report(self) -> Report:
        """A report of the model compiled last, with the totals of the others."""
        if not self._models:
            return Report(())
        *others, last = self._models
        totals = self._gone + Counter(m.totals() for m in others)
        return Report(last.graphs(), last.name, tuple(replace(t, count=n) for t, n in totals.items()))


@dataclass
class _Model:
    """The records of one model.

    Attributes:
        reference: To the model; None if it is not known, or cannot be referred to weakly: then its name stands for it.
        name: Class of the module, or name of the function.
        records: By the graphs' identity.
    """

    reference: weakref.ref[Any] | None
    name: str
    records: dict[object, tuple[GraphRecord, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, owner: Any) -> _Model:
        """Nothing yet of this model."""
        return cls(weakref.ref(owner) if is_weakly_referable(owner) else None, _name(owner))

    def is_of(self, owner: Any) -> bool:
        """Whether this is the same object, not one that has an id of before."""
        if self.reference is None:
            return not is_weakly_referable(owner) and self.name == _name(owner)
        return owner is not None and self.reference() is owner

    def is_gone(self) -> bool:
        """Whether the model is no more."""
        return self.reference is not None and self.reference() is None

    def graphs(self) -> tuple[GraphRecord, ...]:
        """The records of all its graphs."""
        return tuple(record for records in self.records.values() for record in records)

    def totals(self) -> ModelTotals:
        """The bytes of all its graphs."""
        report = Report(self.graphs())
        return ModelTotals(self.name, report.plain_bytes, report.fewbit_bytes)


def graph_identity(gm: fx.GraphModule, example_inputs: Sequence[Any], compile_id: str) -> object:
    """Equal for compilations of one graph of a model, whatever the shapes of its inputs.

    Layers of one class share a frame of Dynamo's; their operations and parameters tell them apart.
    """
    operations = tuple(str(n.target) for n in gm.graph.nodes if n.op.startswith("call_"))
    parameters = tuple(tuple(p.shape) for p in example_inputs if isinstance(p, Tensor) and isinstance(p, nn.Parameter))
    return compile_id.split("/")[0], operations, parameters


def _name(owner: Any) -> str:
    """Without the functions that it was defined in."""
    if owner is None:
        return "a model"
    named = getattr(owner, "__qualname__", None) if not isinstance(owner, nn.Module) else None
    return str(named or type(owner).__qualname__).rsplit("<locals>.", 1)[-1]
