"""The partitioner: what Inductor calls, and the guarantee that no pass does harm."""

from __future__ import annotations

import functools
import hashlib
import inspect
import operator
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
from torch import fx

import fewbit_fx
from fewbit_fx.config import FewBitConfig
from fewbit_fx.torch_private.inductor import CustomPartitionerFn, bypass_caches, donate_nothing, keep_order
from fewbit_fx.torch_private.inputs import LivingInputs, are_described, living_inputs

from .cuts import leaner_cuts, own_cut
from .faults import GRAPH_EXACT, NO_REPORT, Faults, stage
from .original_names import with_original_names
from .partition import Partition
from .pipeline import Work, require_pass_names, run_passes
from .reasons import Cause, Reason
from .record import GraphRecord, graph_record, unexamined_record
from .representations import Proposal
from .shared_with_caller import can_be_kept_apart, inputs_not_to_read, keep_apart
from .splice import copy_module

_NONE = LivingInputs()


class FewBitPartitioner(CustomPartitionerFn):
    """Partition a joint graph so that few-bit codes, not tensors, are saved for the backward.

    It cuts the graph as torch.compile does, and runs the passes of ``pipeline`` on the result.

    Args:
        config: The options.
        record: Called with one :class:`GraphRecord` per partitioned graph.
        kept_inputs: The inputs of Dynamo's graph that live on whatever it saves.
        proposals: Representations beside our own, asked first.
        observe: Called with what the passes found out of each graph. It must change nothing of it.
        modules: The paths of the modules in Dynamo's graph. The option ``skip`` and the reports go by them, and torch's
            own keys have them not.
        own_order: Whether the kernels of a backward with codes run in the order of its graph.
    """

    def __init__(
        self,
        config: FewBitConfig,
        record: Callable[[GraphRecord], None],
        kept_inputs: LivingInputs = _NONE,
        proposals: Sequence[Proposal] = (),
        observe: Callable[[Work], None] | None = None,
        modules: Sequence[str] = (),
        own_order: bool = True,
    ) -> None:
        require_pass_names(config.disable)
        self._config = config
        self._record = record
        self._kept_inputs = kept_inputs
        self._proposals = tuple(proposals)
        self._observe = observe
        self._modules = tuple(modules)
        self._own_order = own_order
        self._is_faulty = False

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The forward and the backward graph. Called by Inductor with AOTAutograd's joint graph."""
        faults, uncut = Faults(self._config.strict), None
        static = tuple(kwargs.get("static_lifetime_input_indices") or ())
        living = LivingInputs(static)
        with faults.of("the look at the joint graph's inputs", GRAPH_EXACT):
            living = living_inputs(gm.graph, static, self._kept_inputs)
        if self._config.recompute:
            with faults.of("the copy of the joint graph", GRAPH_EXACT):
                uncut = copy_module(gm)  # a cut changes its graph
        plain = own_cut(gm, joint_inputs, living.positions, **kwargs)
        with faults.of("the look at the joint graph's inputs", GRAPH_EXACT):
            if not are_described(gm.graph):
                # Those that the cut saves may live anyway, so a code is no gain; others may not, so to save is a loss.
                living = LivingInputs(plain.saved_inputs())
                plain = replace(plain, static_inputs=living.positions)
        with faults.of("the names in the cut", GRAPH_EXACT):
            plain = with_original_names(plain, gm.graph)
        started = time.perf_counter()
        compressed = None
        if not faults.found:
            with faults.of("the choice of a cut", GRAPH_EXACT):
                cuts = {plain: gm.graph}
                if uncut:
                    with stage("the leaner cuts"):
                        kept_out = inputs_not_to_read(plain, living)
                        leaner = leaner_cuts(uncut, joint_inputs, living.positions, kept_out, **kwargs)
                        cuts |= {cut: joint for cut, joint in leaner if can_be_kept_apart(cut, plain, living)}
                compressed = self._compress(cuts, plain, living, faults)
        chosen, record = compressed or (plain, None)
        with faults.of("the report", NO_REPORT):
            if record is None:
                record = unexamined_record(plain, Reason.of(Cause.FAULT, fault=str(faults.found[0][1])))
            self._record(replace(record, pass_seconds=time.perf_counter() - started))
        self._is_faulty |= bool(faults.found)
        faults.warn()
        return chosen.forward, chosen.backward

    def cache_key(self) -> str | None:
        """Every source file that runs, every option, the inputs kept, the names of modules, and numpy.

        None where that does not tell one partition from another: of a proposal that no module has by its name, such as
        a partial one, and after a fault, which another process may not have.
        """
        return None if self._is_faulty else self._key

    def uuid(self) -> Any:
        """Key for Inductor's caches."""
        key = self.cache_key()
        return bypass_caches("fewbit-fx has no key for it") if key is None else key

    def __deepcopy__(self, memo: dict[int, Any]) -> FewBitPartitioner:
        """Inductor copies its configuration, and this within it; records must reach the one listener."""
        return self

    @functools.cached_property
    def _key(self) -> str | None:
        faults = Faults(self._config.strict)
        with faults.of("the key for torch's caches", "keeps a graph out of torch's caches"):
            theirs = [_key_of(proposal) for proposal in self._proposals]
            sources = _source_hash()
            if sources and None not in theirs:
                names = hashlib.sha256(repr(self._modules).encode()).hexdigest()
                graph = f"kept {self._kept_inputs} modules {names} own order {self._own_order}"
                return f"fewbit-fx {sources} {self._config!r} {graph} numpy {numpy.__version__} {theirs}"
        faults.warn()
        return None

    def _compress(
        self, cuts: Mapping[Partition, fx.Graph], plain: Partition, living: LivingInputs, faults: Faults
    ) -> tuple[Partition, GraphRecord]:
        """The partition that saves the fewest bytes, and its record.

        Args:
            cuts: Each with its joint graph as the cut left it: without duplicates, with the names of the cut's graphs.
            plain: torch.compile's own cut.
            living: The inputs that live anyway.
            faults: Where a fault of single sites is added.
        """
        given = (self._config, self._proposals, living.of_modules)
        works = [Work(joint, cut, cut, *given) for cut, joint in cuts.items()]
        work, seconds = run_passes(works)
        with stage("the artifacts for tlparse"):
            if self._observe:
                self._observe(work)
        with stage("the record"):  # without it the report would not say what is not exact
            record = graph_record(plain, work, seconds)
        with stage("the copies of results and inputs"):
            keep_apart(work.chosen, plain, living)
        with stage("the donation of saved tensors"):
            # Or a backward with retain_graph=True would raise that works with inductor.
            if work.chosen.is_donated_in_part() and not plain.is_donated_in_part():
                donate_nothing(work.chosen.forward)
        with stage("the order of the backward"):
            if self._own_order and work.coded:
                keep_order(work.chosen.backward)
        if work.faults:
            what = "one site of a graph" if len(work.faults) == 1 else f"{len(work.faults)} sites of a graph"
            faults.found.append((f"left {what} exact", work.faults[0]))
        return work.chosen, record


def _key_of(proposal: Proposal) -> tuple[str, str, str] | None:
    """Which function of which source file it is; None if no module has it by its name, or it has no file."""
    module, name = (getattr(proposal, key, "") for key in ("__module__", "__qualname__"))
    try:
        found = operator.attrgetter(name)(sys.modules[module])
    except (KeyError, AttributeError):  # a partial function, or one that a function has made
        return None
    if found is not proposal or not inspect.isfunction(found):
        return None
    path = Path(inspect.getfile(found))  # of a notebook's cell there is none
    return (module, name, hashlib.sha256(path.read_bytes()).hexdigest()) if path.is_file() else None


@functools.cache
def _source_hash() -> str:
    """Empty where Python runs from other files, as from an archive."""
    digest, found = hashlib.sha256(), False
    for folder in sorted({Path(__file__).parent, Path(fewbit_fx.__file__).parent}):
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
            found = True
    return digest.hexdigest() if found else ""
