"""Which codes buy memory: those whose exact tensors nothing else in the backward reads.

A code buys memory only where it is saved and what it stands for is not. Where x, or anything else
that f'(x) follows from, is in the backward anyway, the exact derivative costs no memory and is kept.
So it is where the graph returns that to its caller: the model's output, or what another graph reads behind
a graph break, may live until the backward. So fewbit never saves more than torch.compile does, and never
approximates for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import fx

from fewbit_fx.torch_private.sizes import storage_key, storage_nbytes

from .graph import ancestors, by_name, closure, output_values
from .partition import Partition
from .reasons import Cause, Reason
from .sites import Site

NOT_SAVED, NEEDED, RETURNED = Reason(Cause.NOT_SAVED), Reason(Cause.NEEDED), Reason(Cause.RETURNED)
NOT_SMALLER = Reason(Cause.CODE_NOT_SMALLER)


class Gain:
    """Answers for one partition which codes are not worth their bytes."""

    def __init__(self, partition: Partition) -> None:
        graph = partition.backward.graph
        self._nodes = by_name(graph)
        self._outputs = [n for n in output_values(graph) if isinstance(n, fx.Node)]
        storages = partition.saved_storages()
        self._results = partition.returned_storages()
        self._bytes = [max(map(storage_nbytes, nodes)) for nodes in storages.values()]
        self._storage_of = {n.name: i for i, nodes in enumerate(storages.values()) for n in nodes}
        self._returned = {i for i, key in enumerate(storages) if key in self._results}

    def useless(self, cost: Mapping[Site, int]) -> dict[Site, Reason]:
        """The sites whose codes would buy nothing, each with the reason.

        Args:
            cost: Candidates, with the bytes that their codes take.
        """
        leaves = {site: self._leaves(site) for site in cost if self.is_read(site)}
        verdicts = {site: RETURNED for site in cost if self._follows_from_a_result(site)}
        verdicts |= {site: NOT_SAVED for site in cost if not leaves.get(site)}
        while True:
            coded = [site for site in cost if site not in verdicts]
            found = dict(self._verdicts(coded, leaves, cost))
            if not found:
                return verdicts
            verdicts |= found

    def _verdicts(
        self, coded: list[Site], leaves: Mapping[Site, set[int]], cost: Mapping[Site, int]
    ) -> Iterator[tuple[Site, Reason]]:
        """Sites that buy nothing if just these are coded."""
        reached = self._reached(coded)
        decoded = {site.replaced.name for site in coded}
        kept = {self._storage_of[name] for name in reached - decoded if name in self._storage_of}
        freed = {site: leaves[site] - kept - self._returned for site in coded}
        sharers = Counter(storage for storages in freed.values() for storage in storages)
        for site in coded:
            if site.replaced.name not in reached:
                yield site, NOT_SAVED
            elif not freed[site]:
                yield site, RETURNED if leaves[site] - kept else NEEDED
            elif sum(self._bytes[i] / sharers[i] for i in freed[site]) <= cost[site]:
                yield site, NOT_SMALLER

    def saved_bytes(self, coded: Iterable[Site]) -> int:
        """Bytes of the saved tensors that are left where these sites are coded, without their codes."""
        coded = list(coded)
        left = self._reached(coded) - {site.replaced.name for site in coded}
        kept = {self._storage_of[name] for name in left if name in self._storage_of}
        return sum(self._bytes[i] for i in kept)

    def is_read(self, site: Site) -> bool:
        """Whether the backward has all the nodes that a rewrite of the site touches."""
        nodes = (*site.coded_inputs, site.replaced, *site.exact_inputs)
        return all(n.name in self._nodes for n in nodes)

    def _follows_from_a_result(self, site: Site) -> bool:
        """Whether something that lives on determines the factors, whatever the cut saves beside it."""
        return any(storage_key(n) in self._results for n in site.determined_by)

    def _reached(self, coded: Iterable[Site]) -> set[str]:
        """Names of what the backward reads where these sites are coded, what is decoded included."""
        instead = {self._nodes[s.replaced.name]: [self._nodes[n.name] for n in s.coded_inputs] for s in coded}
        return {n.name for n in closure(self._outputs, lambda n: instead.get(n, n.all_input_nodes))}

    def _leaves(self, site: Site) -> set[int]:
        """Saved storages from which the backward computes the exact factors of a site."""
        roots = [self._nodes[n.name] for n in site.exact_inputs]
        return {self._storage_of[n.name] for n in ancestors(roots) if n.name in self._storage_of}
