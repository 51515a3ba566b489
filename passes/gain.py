"""Which codes buy memory: those whose exact tensors nothing else in the backward reads.

A code buys memory only where it is saved and what it stands for is not. Where x, or anything else
that f'(x) follows from, is in the backward anyway, the exact derivative costs no memory and is kept.
So fewbit never saves more than torch.compile does, and never approximates for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import fx

from fewbit_fx._torch import nbytes
from fewbit_fx.passes.graph import ancestors, by_name, closure, output_values
from fewbit_fx.passes.partition import Partition
from fewbit_fx.passes.sites import DerivativeSite, MaskSite, Site


class Gain:
    """Answers for one partition which codes are worth their bytes."""

    def __init__(self, partition: Partition) -> None:
        graph = partition.backward.graph
        self._nodes = by_name(graph)
        self._outputs = [n for n in output_values(graph) if isinstance(n, fx.Node)]
        storages = partition.saved_storages().values()
        self._bytes = [max(map(nbytes, nodes)) for nodes in storages]
        self._storage_of = {n.name: i for i, nodes in enumerate(storages) for n in nodes}

    def worthwhile(self, cost: Mapping[Site, int]) -> set[Site]:
        """The sites to code.

        Args:
            cost: Candidates, with the bytes that their codes take.
        """
        coded = {site for site in cost if all(n.name in self._nodes for n in _touched(site))}
        leaves = {site: self._leaves(site) for site in coded}
        while True:
            reached = self._reached(coded)
            masks = {site.mask.name for site in coded if isinstance(site, MaskSite)}
            kept = {self._storage_of[name] for name in reached - masks if name in self._storage_of}
            freed = {site: leaves[site] - kept for site in coded}
            sharers = Counter(storage for storages in freed.values() for storage in storages)
            idle = {
                site
                for site in coded
                if sum(self._bytes[i] / sharers[i] for i in freed[site]) <= cost[site]
                or (isinstance(site, MaskSite) and site.mask.name not in reached)
            }
            if not idle:
                return coded
            coded -= idle

    def _reached(self, coded: Iterable[Site]) -> set[str]:
        """Names of what the backward reads where these sites are coded, their masks included."""
        instead: dict[fx.Node, list[fx.Node]] = {}
        for site in coded:
            if isinstance(site, DerivativeSite):
                instead[self._nodes[site.exit.name]] = [self._nodes[site.entry.name]]
            else:
                instead[self._nodes[site.mask.name]] = []
        return {n.name for n in closure(self._outputs, lambda n: instead.get(n, n.all_input_nodes))}

    def _leaves(self, site: Site) -> set[int]:
        """Saved storages from which the backward computes the exact factors of a site."""
        roots = [self._nodes[n.name] for n in _exact_inputs(site)]
        return {self._storage_of[n.name] for n in ancestors(roots) if n.name in self._storage_of}


def _exact_inputs(site: Site) -> tuple[fx.Node, ...]:
    return site.factors if isinstance(site, DerivativeSite) else (site.mask,)


def _touched(site: Site) -> tuple[fx.Node, ...]:
    """Nodes that the backward must have for the site to be rewritten there."""
    ends = (site.entry, site.exit) if isinstance(site, DerivativeSite) else ()
    return (*ends, *_exact_inputs(site))
