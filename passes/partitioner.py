"""The partitioner: all passes in their order, and the guarantee that none of them does harm."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
from torch import fx

import fewbit_fx
from fewbit_fx.config import FewBitConfig
from fewbit_fx.torch_private.inductor import CustomPartitionerFn, donate_nothing, min_cut_rematerialization_partition

from .gain import Gain
from .partition import Partition
from .plan import choose
from .record import GraphRecord, graph_record, unexamined_record
from .representations import Decision, Exact, Proposal
from .rewrite import SiteError, rewrite
from .sites import Site, find_sites

logger = logging.getLogger("fewbit_fx")

NOT_SMALLER = "the rewritten graphs came out no smaller, so torch.compile's own are kept"


class FewBitPartitioner(CustomPartitionerFn):
    """Partition a joint graph so that few-bit codes, not tensors, are saved for the backward.

    Order: cut the graph as torch.compile does; find sites in it; choose their representations; keep
    those that buy memory in this cut; rewrite a copy of the cut; take it if it is the smaller one.

    Args:
        config: The options.
        record: Called with one :class:`GraphRecord` per partitioned graph.
        kept_inputs: Positions of the graph's inputs that live on whatever it saves, beside parameters and buffers.
        proposals: Representations beside our own, asked first.
        observe: Called with the sites, torch.compile's own partition and the one in use, of each graph. It must
            change none of them.
    """

    def __init__(
        self,
        config: FewBitConfig,
        record: Callable[[GraphRecord], None],
        kept_inputs: tuple[int, ...] = (),
        proposals: Sequence[Proposal] = (),
        observe: Callable[[Sequence[Site], Partition, Partition], None] | None = None,
    ) -> None:
        self._config = config
        self._record = record
        self._kept_inputs = kept_inputs
        self._proposals = tuple(proposals)
        self._observe = observe

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The forward and the backward graph. Called by Inductor with AOTAutograd's joint graph."""
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        started = time.perf_counter()
        static = kwargs.get("static_lifetime_input_indices") or ()
        alive = tuple(sorted({*static, *self._kept_inputs}))
        plain = Partition(forward, backward, kwargs["num_fwd_outputs"], alive)
        try:
            chosen, record = self._compress(gm.graph, plain)
        except Exception as fault:  # whatever it is: the user's training goes on, exactly, and is told so
            if self._config.strict:
                raise
            _warn_of("a graph", fault)
            chosen, record = plain, unexamined_record(plain, f"left exact after a fault: {fault!r}")
        if chosen.is_donated_in_part() and not plain.is_donated_in_part():
            donate_nothing(chosen.forward)  # or a backward with retain_graph=True would raise that works with inductor
        record = replace(record, pass_seconds=time.perf_counter() - started)
        _log(record)
        self._record(record)
        return chosen.forward, chosen.backward

    def uuid(self) -> Any:
        """Key for Inductor's caches: every source file that runs, every option, the inputs kept, and numpy."""
        theirs = [(p.__module__, p.__qualname__, _file_hash(inspect.getfile(p))) for p in self._proposals]
        return (
            f"fewbit-fx {_source_hash()} {self._config!r} kept {self._kept_inputs} numpy {numpy.__version__} {theirs}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FewBitPartitioner:
        """Inductor copies its configuration, and this within it; records must reach the one listener."""
        return self

    def _compress(self, joint: fx.Graph, plain: Partition) -> tuple[Partition, GraphRecord]:
        """``joint`` is as the cut left it: without duplicates, with the names that the cut's graphs have."""
        sites, unreadable = find_sites(joint, plain.computed_in_backward())
        symbols = plain.symbols_in_backward()
        plan = _without_useless_codes(
            {site: choose(site, self._config, symbols, self._proposals) for site in sites}, plain
        )
        chosen, plan = self._rewritten(plain, plan)
        if chosen is not plain and chosen.saved_bytes() >= plain.saved_bytes():
            chosen = plain
            plan = {s: r if isinstance(r, Exact) else Exact(NOT_SMALLER) for s, r in plan.items()}
        if self._observe:
            self._observe(sites, plain, chosen)
        return chosen, graph_record(plain, chosen, plan, unreadable, self._config.min_numel)

    def _rewritten(self, plain: Partition, plan: dict[Site, Decision]) -> tuple[Partition, dict[Site, Decision]]:
        """The partition with the plan's codes, and the plan without the sites at which that failed."""
        faults: list[BaseException] = []
        chosen = plain
        while any(not isinstance(r, Exact) for r in plan.values()):
            try:
                chosen = rewrite(plain, plan)
                break
            except SiteError as error:
                fault = error.__cause__ or error
                if self._config.strict:
                    raise fault from None
                faults.append(fault)
                plan = _without_useless_codes({**plan, error.site: Exact(f"of a fault there: {fault!r}")}, plain)
        if faults:
            _warn_of(f"{len(faults)} sites of a graph" if len(faults) > 1 else "one site of a graph", faults[0])
        return chosen, plan


def _without_useless_codes(plan: dict[Site, Decision], partition: Partition) -> dict[Site, Decision]:
    cost = {s: r.nbytes for s, r in plan.items() if not isinstance(r, Exact)}
    useless = Gain(partition).useless(cost)
    return {s: Exact(useless[s]) if s in useless else r for s, r in plan.items()}


def _log(record: GraphRecord) -> None:
    """A line per decision, for ``TORCH_LOGS="+fewbit_fx"``."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    for site in record.sites:
        why = f", because {site.reason}" if site.reason else ""
        where = site.module or site.source_line or "-"
        logger.debug("graph %s: %s %s: %s%s", record.compile_id, where, site.function, site.action, why)
    logger.debug(
        "graph %s: %d bytes saved instead of %d; %.3f s",
        record.compile_id,
        record.fewbit_bytes,
        record.plain_bytes,
        record.pass_seconds,
    )


def _warn_of(what: str, fault: BaseException) -> None:
    logger.debug("fault in the fewbit passes", exc_info=fault)
    warnings.warn(
        f"fewbit-fx left {what} exact after a fault of its own ({fault!r}). Training goes on, without the "
        f"saving. Please report it; the option strict=True raises it instead.",
        stacklevel=3,
    )


def _file_hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    for folder in sorted({Path(__file__).parent, Path(fewbit_fx.__file__).parent}):
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()
