"""Names of sites, by which a report, the option ``skip`` and the saved tensors call them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from .provenance import module_path
from .sites import Site


def site_names(sites: Iterable[Site]) -> Mapping[Site, str]:
    """A name for each site of a graph, such as ``blocks.0.act.gelu``; equal ones are numbered from the second on.

    Args:
        sites: The sites of one graph, in its order.
    """
    seen: Counter[str] = Counter()
    names = {}
    for site in sites:
        base = ".".join(part for part in (module_path(site.anchor), site.function.replace(" ", "_")) if part)
        seen[base] += 1
        names[site] = base if seen[base] == 1 else f"{base}#{seen[base]}"
    return names
