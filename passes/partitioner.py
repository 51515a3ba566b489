"""The partitioner: what Inductor calls, and the guarantee that no pass does harm."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
from torch import fx

import fewbit_fx
from fewbit_fx.config import FewBitConfig
from fewbit_fx.torch_private.inductor import CustomPartitionerFn, donate_nothing

from .cuts import leaner_cuts, own_cut
from .partition import Partition
from .pipeline import Work, require_pass_names, run_passes
from .reasons import Cause, Reason
from .record import GraphRecord, graph_record, unexamined_record
from .representations import Proposal
from .splice import copy_module

logger = logging.getLogger("fewbit_fx")


class FewBitPartitioner(CustomPartitionerFn):
    """Partition a joint graph so that few-bit codes, not tensors, are saved for the backward.

    It cuts the graph as torch.compile does, and runs the passes of ``pipeline`` on the result.

    Args:
        config: The options.
        record: Called with one :class:`GraphRecord` per partitioned graph.
        kept_inputs: Positions of the graph's inputs that live on whatever it saves, beside parameters and buffers.
        proposals: Representations beside our own, asked first.
        observe: Called with what the passes found out of each graph. It must change nothing of it.
    """

    def __init__(
        self,
        config: FewBitConfig,
        record: Callable[[GraphRecord], None],
        kept_inputs: tuple[int, ...] = (),
        proposals: Sequence[Proposal] = (),
        observe: Callable[[Work], None] | None = None,
    ) -> None:
        require_pass_names(config.disable)
        self._config = config
        self._record = record
        self._kept_inputs = kept_inputs
        self._proposals = tuple(proposals)
        self._observe = observe

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The forward and the backward graph. Called by Inductor with AOTAutograd's joint graph."""
        static = kwargs.get("static_lifetime_input_indices") or ()
        alive = tuple(sorted({*static, *self._kept_inputs}))
        uncut = copy_module(gm) if self._config.recompute else None  # a cut changes its graph
        plain = own_cut(gm, joint_inputs, alive, **kwargs)
        started = time.perf_counter()
        try:
            cuts = {plain: gm.graph}
            if uncut:
                leaner = leaner_cuts(uncut, joint_inputs, alive, **kwargs)
                # One that saves a result where torch.compile saves what it computes from it would forbid the caller
                # to write to that, and go wrong without a word where the result is a view.
                cuts |= {cut: joint for cut, joint in leaner if cut.saved_results() <= plain.saved_results()}
            chosen, record = self._compress(cuts, plain)
        except Exception as fault:  # whatever it is: the user's training goes on, exactly, and is told so
            if self._config.strict:
                raise
            _warn_of("a graph", fault)
            chosen, record = plain, unexamined_record(plain, Reason.of(Cause.FAULT, fault=repr(fault)))
        if chosen.is_donated_in_part() and not plain.is_donated_in_part():
            donate_nothing(chosen.forward)  # or a backward with retain_graph=True would raise that works with inductor
        self._record(replace(record, pass_seconds=time.perf_counter() - started))
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

    def _compress(self, cuts: Mapping[Partition, fx.Graph], plain: Partition) -> tuple[Partition, GraphRecord]:
        """The partition that saves the fewest bytes, and its record.

        Args:
            cuts: Each with its joint graph as the cut left it: without duplicates, with the names of the cut's graphs.
            plain: torch.compile's own cut.
        """
        works = [Work(joint, cut, cut, self._config, self._proposals) for cut, joint in cuts.items()]
        work, seconds = run_passes(works)
        if work.faults:
            several = len(work.faults) > 1
            _warn_of(f"{len(work.faults)} sites of a graph" if several else "one site of a graph", work.faults[0])
        if self._observe:
            self._observe(work)
        return work.chosen, graph_record(plain, work, seconds)


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
