"""The passes in their order. Each takes what is known of a graph and returns what is known after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from fewbit_fx.config import FewBitConfig
from fewbit_fx.torch_private.tracing import timed

from .faults import Fault, stage
from .gain import Gain
from .jumps import jumps
from .laid_out import note_layouts
from .partition import Partition
from .plan import choose
from .reasons import Cause, Reason
from .representations import Decision, Exact, Proposal, Representation
from .rewrite import SiteError, rewrite
from .same_names import SameNames
from .site_names import site_names
from .sites import Site, Unreadable, find_sites, find_values
from .softmax_rows import Row, balance, softmax_rows
from .weights import weights

NOT_SMALLER, DECIDES, RENAMED = map(Reason, (Cause.GRAPHS_NOT_SMALLER, Cause.DECIDES, Cause.RENAMED))
WEIGHT = Reason(Cause.WEIGHT)


@dataclass(frozen=True)
class Work:
    """What is known of one graph.

    Attributes:
        joint: The joint graph as the cut left it: without duplicates, with the names that the cut's graphs have.
        plain: torch.compile's own partition.
        chosen: The partition to use: the plain one, or a rewritten copy.
        config: The options.
        proposals: Representations beside our own, asked first.
        of_modules: Positions of the inputs that are parameters and buffers of modules.
        sites: The sites with their names, in the order of the graph.
        unreadable: Regions whose derivative could not be read off the graph.
        proposed: The representations that suit sites, each by itself.
        plan: What to do with each site, in the order of the graph.
        faults: The faults of our own code, each of which cost one site.
    """

    joint: fx.Graph
    plain: Partition
    chosen: Partition
    config: FewBitConfig
    proposals: Sequence[Proposal] = ()
    of_modules: Collection[int] = ()
    sites: Mapping[Site, str] = field(default_factory=dict)
    unreadable: Sequence[Unreadable] = ()
    proposed: Mapping[Site, Representation] = field(default_factory=dict)
    plan: Mapping[Site, Decision] = field(default_factory=dict)
    faults: Sequence[Fault] = ()

    @property
    def coded(self) -> dict[Site, int]:
        """The sites that the plan stores otherwise, with the bytes that this takes."""
        return {site: decision.nbytes for site, decision in self.plan.items() if not isinstance(decision, Exact)}

    def softmax_rows(self) -> list[Row]:
        """Where the backward has the gradient of a softmax whose probabilities the plan makes inexact."""
        inexact = {site.replaced.name for site, done in self.plan.items() if _is_inexact(done)}
        return list(softmax_rows(self.joint, self.plain.backward.graph, inexact))

    def predicted_bytes(self) -> int:
        """Bytes that will be saved at the end; sites of one value and encode share their codes."""
        codes = {
            (site.stored, decision.encode): decision.nbytes
            for site, decision in self.plan.items()
            if not isinstance(decision, Exact)
        }
        return min(Gain(self.plain).saved_bytes(self.coded) + sum(codes.values()), self.plain.saved_bytes())

    def with_exact(self, reasons: Mapping[Site, Reason]) -> Work:
        """The same with some sites left exact."""
        plan = {site: Exact(reasons[site]) if site in reasons else done for site, done in self.plan.items()}
        return replace(self, plan=plan)

    def all_exact(self, reason: Reason) -> Work:
        """torch.compile's own partition, with a reason for the sites that have none yet."""
        return replace(self.with_exact(dict.fromkeys(self.coded, reason)), chosen=self.plain)


def _is_inexact(decision: Decision) -> bool:
    return not isinstance(decision, Exact) and decision.relative_error > 0


def find(work: Work) -> Work:
    """Find the sites, and how their tensors will lie in memory."""
    note_layouts(work.joint, work.plain.forward)
    sites, unreadable = find_sites(work.joint, work.plain.computed_in_backward())
    if work.config.codes_values:
        sites += find_values(work.joint, work.plain)
    return replace(work, sites=site_names(sites), unreadable=unreadable)


def represent(work: Work) -> Work:
    """Choose a representation for each site by itself."""
    symbols = work.plain.symbols_in_backward()
    same, of_weights = SameNames(work.joint, work.plain), weights(work.joint, work.of_modules)

    def decided(site: Site, name: str) -> Decision:
        if not same.hold_for(site):
            return Exact(RENAMED)
        done = choose(site, work.config, symbols, work.proposals, name)
        return Exact(WEIGHT) if _is_inexact(done) and site.stored in of_weights else done

    plan = {site: decided(site, name) for site, name in work.sites.items()}
    proposed = {site: done for site, done in plan.items() if not isinstance(done, Exact)}
    return replace(work, plan=plan, proposed=proposed)


def drop_useless(work: Work) -> Work:
    """Leave exact what would free no saved tensor."""
    gain = Gain(work.plain)
    first = {site: nbytes for site, nbytes in work.coded.items() if not site.is_last_resort}
    work = work.with_exact(gain.useless(first))
    return work.with_exact(gain.useless(work.coded)) if len(first) < len(work.plan) else work


def keep_decisions(work: Work) -> Work:
    """Save the masks that the backward would compute anew from decoded values, or leave those values exact."""
    masks = {site.replaced.name: site for site in work.proposed if not site.is_last_resort}
    while True:
        values = {site.replaced.name: site for site in work.coded if site.is_last_resort}
        decoded = {site.replaced.name for site in work.coded}
        found = jumps(work.plain.backward.graph, decoded, _rounded_at_random(work))
        if not found or not values:
            return work
        kept = {masks[name]: work.proposed[masks[name]] for name in found if name in masks}
        lost = {values[origin] for name in found.keys() - masks.keys() for origin in found[name] if origin in values}
        if not kept and not lost:
            return work
        work = replace(work, plan={site: kept.get(site, done) for site, done in work.plan.items()})
        work = work.with_exact(dict.fromkeys(lost, DECIDES))


def _rounded_at_random(work: Work) -> set[str]:
    plan = work.plan.items()
    return {site.replaced.name for site, done in plan if not isinstance(done, Exact) and done.encode.seeded}


def drop_unread(work: Work) -> Work:
    """In place of :func:`drop_useless`: leave exact what the backward has not all the nodes of."""
    gain = Gain(work.plain)
    unread = [site for site in work.coded if not gain.is_read(site)]
    return work.with_exact(dict.fromkeys(unread, Reason(Cause.NOT_SAVED)))


def put_in(work: Work) -> Work:
    """Rewrite a copy of the partition; a site at which that fails is left exact.

    Raises:
        Fault: With the option ``strict``, of whatever a site failed with.
    """
    while work.coded:
        try:
            chosen = rewrite(work.plain, work.plan, work.sites)
            if rows := work.softmax_rows():
                balance(chosen.backward, rows)  # which compiles the graph once more
            return replace(work, chosen=chosen)
        except SiteError as error:
            fault = Fault("the pass 'rewrite'", error.cause)
            if work.config.strict:
                raise fault from error.cause
            reason = Reason.of(Cause.FAULT, fault=str(fault))
            work = replace(work, faults=(*work.faults, fault)).with_exact({error.site: reason})
            work = drop_useless(work)  # one that shared a saved tensor with it may now free none
    return work


def keep_the_smaller(work: Work) -> Work:
    """Go back to torch.compile's own partition unless the rewritten one saves fewer bytes."""
    if work.chosen is work.plain or work.chosen.saved_bytes() < work.plain.saved_bytes():
        return work
    return work.all_exact(NOT_SMALLER)


@dataclass(frozen=True)
class Pass:
    """One step.

    Attributes:
        name: By which the option ``disable`` and the times call it.
        run: The step.
        instead: What runs where it is disabled.
    """

    name: str
    run: Callable[[Work], Work]
    instead: Callable[[Work], Work] = lambda work: work


def _left_out(name: str) -> Callable[[Work], Work]:
    return lambda work: work.all_exact(Reason.of(Cause.DISABLED, name=name))


def _all_sites_exact(work: Work) -> Work:
    return replace(work, plan=dict.fromkeys(work.sites, Exact(Reason.of(Cause.DISABLED, name="represent"))))


PLANNING = (
    Pass("find", find),
    Pass("represent", represent, instead=_all_sites_exact),
    Pass("gain", drop_useless, instead=drop_unread),
    Pass("protect", keep_decisions),
)
"""They change no graph."""

CARRYING_OUT = (
    Pass("rewrite", put_in, instead=_left_out("rewrite")),
    Pass("compare", keep_the_smaller),
)
PASSES = (*PLANNING, *CARRYING_OUT)


def run_passes(works: Iterable[Work]) -> tuple[Work, dict[str, float]]:
    """Run all passes but those that the option ``disable`` names on the cuts of one graph.

    Rewriting takes the most time, so that it is left out for a cut of which more bytes are predicted than another's
    rewritten partition saves.

    Returns:
        What is known at the end of the cut that saves the fewest bytes, and the seconds that each pass took, by name.
    """
    seconds = dict.fromkeys((step.name for step in PASSES), 0.0)
    planned = [_run(PLANNING, work, seconds) for work in works]
    best: Work | None = None
    for predicted, work in sorted(((work.predicted_bytes(), work) for work in planned), key=lambda pair: pair[0]):
        if best is None or predicted < best.chosen.saved_bytes():
            done = _run(CARRYING_OUT, work, seconds)
            best = done if best is None else min(best, done, key=lambda w: w.chosen.saved_bytes())
    assert best is not None, "a graph has a cut"
    return best, seconds


def _run(steps: Iterable[Pass], work: Work, seconds: dict[str, float]) -> Work:
    """Run some passes, and add up the time of each."""
    for step in steps:
        disabled = step.name in work.config.disable
        started = time.perf_counter()
        with stage(f"the pass {step.name!r}"), timed(f"fewbit_fx.{step.name}"):
            work = (step.instead if disabled else step.run)(work)
        seconds[step.name] += time.perf_counter() - started
    return work


def require_pass_names(names: Collection[str]) -> None:
    """Check the option ``disable``.

    Raises:
        ValueError: A name that no pass has.
    """
    known = [step.name for step in PASSES]
    for name in names:
        if name not in known:
            raise ValueError(f"fewbit option 'disable' has {name!r}; allowed are the passes {', '.join(known)}")
