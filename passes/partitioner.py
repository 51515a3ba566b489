"""The partitioner: all passes in their order, and the guarantee that none of them does harm."""

from __future__ import annotations

import functools
import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
from fewbit_fx.passes.gain import Gain
from fewbit_fx.passes.partition import Partition
from fewbit_fx.passes.plan import choose
from fewbit_fx.passes.record import GraphRecord, graph_record, unexamined_record
from fewbit_fx.passes.representation import Exact, Representation, code_bytes
from fewbit_fx.passes.rewrite import rewrite
from fewbit_fx.passes.sites import Site, find_sites
from functorch.compile import min_cut_rematerialization_partition
from torch import fx

from fewbit_fx import codec
from fewbit_fx._torch import CustomPartitionerFn
from fewbit_fx.config import FewBitConfig

logger = logging.getLogger("fewbit_fx")

NOT_SMALLER = "the rewritten graphs came out no smaller, so torch.compile's own are kept"


class FewBitPartitioner(CustomPartitionerFn):
    """Partition a joint graph so that few-bit codes, not tensors, are saved for the backward.

    Order: cut the graph as torch.compile does; find sites in it; choose their representations; keep
    those that buy memory in this cut; rewrite a copy of the cut; take it if it is the smaller one.

    Args:
        config: The options.
        record: Called with one :class:`GraphRecord` per partitioned graph.
    """

    def __init__(self, config: FewBitConfig, record: Callable[[GraphRecord], None]) -> None:
        self._config = config
        self._record = record

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The forward and the backward graph. Called by Inductor with AOTAutograd's joint graph."""
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        started = time.perf_counter()
        static = kwargs.get("static_lifetime_input_indices") or ()
        plain = Partition(forward, backward, kwargs["num_fwd_outputs"], tuple(static))
        try:
            chosen, record = self._compress(gm.graph, plain)
        except Exception as fault:  # whatever it is: the user's training goes on, exactly, and is told so
            if self._config.strict:
                raise
            _warn_of(fault)
            chosen, record = plain, unexamined_record(plain, f"left exact after a fault: {fault!r}")
        self._record(replace(record, pass_seconds=time.perf_counter() - started))
        return chosen.forward, chosen.backward

    def uuid(self) -> Any:
        """Key for Inductor's caches: every source file that runs, every option, and the fitter's numpy."""
        return f"fewbit-fx {_source_hash()} {self._config!r} numpy {numpy.__version__}"

    def __deepcopy__(self, memo: dict[int, Any]) -> FewBitPartitioner:
        """Inductor copies its configuration, and this within it; records must reach the one listener."""
        return self

    def _compress(self, joint: fx.Graph, plain: Partition) -> tuple[Partition, GraphRecord]:
        """``joint`` is as the cut left it: without duplicates, with the names that the cut's graphs have."""
        sites, unreadable = find_sites(joint, plain.computed_in_backward())
        plan = _without_idle_codes({site: choose(site, self._config) for site in sites}, plain)
        chosen = plain
        if any(not isinstance(r, Exact) for r in plan.values()):
            chosen = rewrite(plain, plan)
            if chosen.saved_bytes() >= plain.saved_bytes():
                chosen = plain
                plan = {s: r if isinstance(r, Exact) else Exact(NOT_SMALLER) for s, r in plan.items()}
        return chosen, graph_record(plain, chosen, plan, unreadable, self._config.min_numel)


def _without_idle_codes(plan: dict[Site, Representation], partition: Partition) -> dict[Site, Representation]:
    cost = {s: size for s, r in plan.items() if (size := code_bytes(s, r)) is not None}
    idle = Gain(partition).idle(cost)
    return {s: Exact(idle[s]) if s in idle else r for s, r in plan.items()}


def _warn_of(fault: Exception) -> None:
    logger.debug("fault in the fewbit passes", exc_info=fault)
    warnings.warn(
        f"fewbit-fx left a graph exact after a fault of its own ({fault!r}). Training goes on, without the "
        f"saving. Please report it; the option strict=True raises it instead.",
        stacklevel=3,
    )


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    for folder in sorted({Path(__file__).parent, Path(codec.__file__).parent}):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
