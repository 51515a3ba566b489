"""Which row of a report counts which saved bytes: each storage counts for exactly one, so that rows sum to totals.

Coded sites come first, with what they freed and with their codes. Then sites left exact, with what is
still saved for them. What no site claims is left over, and is named by what reads it in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from fewbit_fx.torch_private.sizes import storage_nbytes

from .graph import ancestors, by_name, closure, descendants, is_pointwise, is_view, tangents
from .partition import Partition
from .rewrite import SITE
from .sites import Site, Unreadable

Claimant = Site | Unreadable


@dataclass(frozen=True)
class Share:
    """Bytes of the storages that count for one row: saved by torch.compile's partition, and by the one in use."""

    before: int = 0
    after: int = 0


@dataclass(frozen=True)
class Leftover:
    """A saved storage that no site claims.

    Attributes:
        node: The node of the forward whose value the storage holds.
        readers: Names of the operations of the backward that bring it together with a gradient, sorted.
        share: The bytes of the storage.
    """

    node: fx.Node
    readers: tuple[str, ...]
    share: Share


@dataclass(frozen=True)
class Attribution:
    """For each storage that two partitions save, the row that counts it."""

    shares: Mapping[Claimant, Share]
    leftovers: tuple[Leftover, ...]


def attribute(
    plain: Partition, cut: Partition, chosen: Partition, coded: Iterable[Site], exact: Iterable[Claimant]
) -> Attribution:
    """Share out the saved storages of both partitions.

    Args:
        plain: torch.compile's own partition.
        cut: The one whose sites these are; torch.compile's own, or a leaner one.
        chosen: The one in use, a rewritten copy of the cut or the same.
        coded: The sites that have codes in ``chosen``, in the order of its rewrite.
        exact: All others.
    """
    ledger = _Ledger(plain, cut, chosen)
    shares: dict[Claimant, Share] = {site: ledger.coded(site) for site in coded}
    shares |= {claimant: ledger.exact(claimant) for claimant in exact}
    return Attribution(shares, tuple(ledger.leftovers()))


class _Ledger:
    """The storages that are not counted yet, by key."""

    def __init__(self, plain: Partition, cut: Partition, chosen: Partition) -> None:
        self._backward = plain.backward.graph, chosen.backward.graph
        self._before, self._after = _storages(plain), _storages(chosen)
        self._saved_after = frozenset(self._after)
        self._storage_after = {n.name: key for key, nodes in self._after.items() for n in nodes}
        self._storage_of = {n.name: key for key, nodes in self._before.items() for n in nodes}
        self._nodes = by_name(plain.backward.graph)
        self._cut_nodes = by_name(cut.backward.graph) if cut is not plain else {}
        self._codes: dict[str, list[object]] = {}
        for key, (node, *_) in self._after.items():
            if SITE in node.meta:
                self._codes.setdefault(node.meta[SITE], []).append(key)

    def coded(self, site: Site) -> Share:
        """The site's codes, and what is no longer saved: what its exact factors were computed from, and, with another
        cut, what the backward computes again from what is decoded.
        """
        freed = (self._leaves(site, ancestors) | self._computed_again_from(site)) - self._saved_after
        return self._take([*freed, *self._codes.get(site.anchor.name, ())])

    def _computed_again_from(self, site: Site) -> set[object]:
        """Storages that ``plain`` saves and that the cut computes again from the value that is decoded for a site."""
        node = self._cut_nodes.get(site.replaced.name)
        behind = descendants([node]) if node and site.is_last_resort else set()
        return {self._storage_of[n.name] for n in behind if n.name in self._storage_of}

    def exact(self, claimant: Claimant) -> Share:
        """What is saved of the values from which the factors of a site left exact follow element by element.

        Another cut may save under another name than torch.compile's own.
        """
        by_name = {self._storage_after[n.name] for n in claimant.exact_inputs if n.name in self._storage_after}
        return self._take(self._leaves(claimant, _elementwise_ancestors) & self._saved_after | by_name)

    def leftovers(self) -> Iterator[Leftover]:
        """The storages that no site counts, in the order in which they are saved."""
        readers = [_readers(graph) for graph in self._backward]
        for i, storages in enumerate((dict(self._before), dict(self._after))):
            for key, nodes in storages.items():
                if key in self._before or key in self._after:
                    names = {name for n in nodes for name in readers[i].get(n.name, ())}
                    yield Leftover(nodes[0], tuple(sorted(names)), self._take([key]))

    def _leaves(self, claimant: Claimant, walk: Callable[[list[fx.Node]], set[fx.Node]]) -> set[object]:
        """Storages that ``plain`` saves and from which the backward computes the exact factors."""
        roots = [self._nodes[n.name] for n in claimant.exact_inputs if n.name in self._nodes]
        return {self._storage_of[n.name] for n in walk(roots) if n.name in self._storage_of}

    def _take(self, keys: Iterable[object]) -> Share:
        """Count these storages, but for those that count already."""
        keys = list(keys)
        before, after = (sum(_nbytes(uncounted.pop(k, [])) for k in keys) for uncounted in (self._before, self._after))
        return Share(before, after)


def _storages(partition: Partition) -> dict[object, list[fx.Node]]:
    """The saved storages by a key that holds for copies of the partition too."""
    found = partition.saved_storages()
    return {key.name if isinstance(key, fx.Node) else key: nodes for key, nodes in found.items()}


def _nbytes(nodes: list[fx.Node]) -> int:
    """Bytes of the storage that these nodes are views of, as Partition.saved_bytes counts it."""
    return max(map(storage_nbytes, nodes), default=0)


def _elementwise_ancestors(roots: list[fx.Node]) -> set[fx.Node]:
    """The roots and what they follow from element by element, not by way of a reduction."""
    return closure(roots, lambda n: n.all_input_nodes if is_pointwise(n) or is_view(n) else ())


def _readers(backward: fx.Graph) -> dict[str, set[str]]:
    """For each node's name the operations that bring it, or what is recomputed from it, together with a gradient."""
    gradients = descendants(tangents(backward))
    found: dict[str, set[str]] = {}
    for node in reversed(backward.nodes):
        if node in gradients and node.op == "call_function":
            found[node.name] = {_operation(node)}
        else:
            found[node.name] = set().union(*(found[user.name] for user in node.users))
    return found


def _operation(node: fx.Node) -> str:
    """The operation that the node was decomposed from, as ``native_layer_norm_backward``."""
    target = node.meta.get("original_aten") or node.target
    return str(getattr(target, "__name__", target)).split(".")[0]
