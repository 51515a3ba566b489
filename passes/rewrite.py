"""Put the planned representations into a partition.

    before   forward:  x -> y = f(x);  x saved              backward:  g' = g * f'(x)
    after    forward:  x -> y = f(x);  planes = encode(f'(x)) saved
                                                            backward:  g' = g * decode(planes)

Torch's own passes over saved tensors (``activation_quantization_aten_pass``, inlined
``saved_tensors_hooks``) edit the partitioned pair in the same way. The rest of the forward stays
as torch.compile would have it, saved tensors included, and so do its kernels' roundings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from fewbit_fx.codec.dither import rounding_seed
from fewbit_fx.torch_private.modes import mode_of

from .graph import by_name, closure, output_values, placeholders, value_of
from .partition import Partition
from .representations import Decision, Encode, Exact, Representation
from .sites import Site
from .splice import after, description, splice, trace

PREFIX = "fewbit_plane"
SITE = "fewbit_site"  # key of a plane's metadata: the name of the anchor of the first site that saves it


class SiteError(Exception):
    """A site could not be rewritten; its cause says why."""

    def __init__(self, site: Site, cause: Exception) -> None:
        super().__init__(site)
        self.site = site
        self.cause = cause


def rewrite(partition: Partition, plan: Mapping[Site, Decision], names: Mapping[Site, str]) -> Partition:
    """A rewritten copy of the partition, with the representations of the plan.

    Args:
        partition: What to rewrite.
        plan: What to do with each site.
        names: The names of the sites, which the planes carry.

    Raises:
        SiteError: A site cannot be rewritten. The partition is as it was, and may be rewritten without the site.
    """
    rewriter = _Rewriter(partition.copy())
    for site, decision in plan.items():
        if isinstance(decision, Exact):
            continue
        try:
            rewriter.rewrite(decision, names.get(site, ""))
        except Exception as fault:  # of ours, or of a user's operator in the trace
            raise SiteError(site, fault) from fault
        rewriter.attribute(site)
    return rewriter.finish()


class _Rewriter:
    """Rewrites one partition in place, site by site."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._forward = by_name(partition.forward.graph)
        self._backward = by_name(partition.backward.graph)
        self._symbols, self._backward_symbols = partition.symbols()
        inputs = placeholders(partition.backward.graph)
        self._behind_planes = next(n for n in inputs if n not in self._backward_symbols)
        self._planes: list[fx.Node] = []
        self._shared: dict[object, list[fx.Node]] = {}
        self._traces: dict[object, fx.Graph] = {}
        self._seeds: dict[torch.device, fx.Node] = {}

    def rewrite(self, representation: Representation, name: str) -> None:
        """Save what stands for the site, and let the backward go on from what is decoded."""
        site, decode = representation.site, representation.decode
        saved = self._saved(representation, name)
        replaced = self._backward[site.replaced.name]
        before, like = site.place(replaced)
        own, codes = len(site.coded_inputs), len(site.coded_inputs) + len(saved)

        def decoded(*values: Tensor) -> list[Tensor]:
            return [decode(values[:own], values[own:codes])]

        inputs = [*(self._backward[n.name] for n in site.coded_inputs), *saved, *self._backward_symbols]
        (value,) = splice(self._traced((decode, own, codes), decoded, inputs), inputs, before, like)
        replaced.replace_all_uses_with(value)
        self._backward[site.replaced.name] = value  # the next site may begin where this one ends

    def attribute(self, site: Site) -> None:
        """Note on the planes that are new whose they are."""
        for plane in reversed(self._planes):
            if SITE in plane.meta:
                return
            plane.meta[SITE] = site.anchor.name

    def finish(self) -> Partition:
        """Drop what is no longer saved, from both graphs alike, and save the planes."""
        backward = self._partition.backward.graph
        backward.eliminate_dead_code()
        unread = {n.name for n in placeholders(backward) if not n.users}
        dropped = unread & {n.name for n in self._partition.saved()}
        for node in placeholders(backward):
            if node.name in dropped:
                backward.erase_node(node)
        self._return_planes(dropped)
        for graph_module in (self._partition.forward, self._partition.backward):
            graph_module.graph.eliminate_dead_code()
            graph_module.graph.lint()
            graph_module.recompile()
        return self._partition

    def _traced(self, key: object, function: Callable[..., list[Tensor]], inputs: list[fx.Node]) -> fx.Graph:
        """The trace of a function; one for all sites of a kind, as the layers of a model are."""
        full_key = key, tuple(map(description, inputs))
        if full_key not in self._traces:
            self._traces[full_key] = trace(function, inputs)
        return self._traces[full_key]

    def _saved(self, representation: Representation, name: str) -> list[fx.Node]:
        """The placeholders in the backward of what stands for a site; sites of one value and encode share them."""
        encode = representation.encode
        key = representation.site.stored, encode
        if key not in self._shared:
            value = self._in_forward(representation.site.stored)
            self._shared[key] = self._save(value, encode, representation.tensors, name)
        return self._shared[key]

    def _save(self, value: fx.Node, encode: Encode, count: int, name: str) -> list[fx.Node]:
        """Encode a value of the forward; returns the planes' placeholders in the backward."""
        first = len(self._planes)
        suffix = re.sub(r"\W+", "_", f"_{name}" if name else "")
        names = [f"{PREFIX}_{i}{suffix}" for i in range(first, first + count)]
        seed = [self._seed(value)] if encode.seeded else []
        before = after(max([value, *seed, *self._symbols]))
        inputs = [value, *seed, *self._symbols]
        given = 1 + len(seed)
        traced = self._traced(encode, lambda *values: encode(*values[:given]), inputs)
        planes = splice(traced, inputs, before, value, names)
        self._planes += planes
        loaded = []
        graph = self._partition.backward.graph
        with graph.inserting_before(self._behind_planes):
            for plane in planes:
                placeholder = graph.placeholder(plane.name)
                placeholder.meta = dict(plane.meta)
                loaded.append(placeholder)
        return loaded

    def _seed(self, value: fx.Node) -> fx.Node:
        """The node of the seed for a value's device, at the beginning of the forward."""
        device = value_of(value).device
        if device not in self._seeds:
            first = after(placeholders(value.graph)[-1])
            with value.graph.inserting_before(first), mode_of(value_of(value)):
                node = value.graph.call_function(torch.ops.fewbit_fx.rounding_seed.default, (device,))
                node.meta["val"] = rounding_seed(device)
            self._seeds[device] = node
        return self._seeds[device]

    def _in_forward(self, node: fx.Node) -> fx.Node:
        """The forward's node of this name; computed anew where the forward had no use for it."""
        graph, known = self._partition.forward.graph, self._forward
        reached = closure([node], lambda n: () if n.name in known else n.all_input_nodes)
        for each in sorted(n for n in reached if n.name not in known):
            assert each.op == "call_function", f"the forward lacks its input {each.name}"
            inputs = [known[n.name] for n in each.all_input_nodes]
            last = max(inputs) if inputs else placeholders(graph)[-1]  # a constant has no inputs
            with graph.inserting_before(after(last)):
                known[each.name] = graph.node_copy(each, lambda n: known[n.name])
        return known[node.name]

    def _return_planes(self, dropped: set[str]) -> None:
        graph = self._partition.forward.graph
        output = graph.output_node()
        split = self._partition.num_fwd_outputs
        values = output_values(graph)
        kept = [i for i, n in enumerate(values) if i < split or not (isinstance(n, fx.Node) and n.name in dropped)]
        # The lists in the output's metadata run parallel to the outputs; a plane takes the entry of
        # the first saved value.
        order: Sequence[int] = [*kept[:split], *[split] * len(self._planes), *kept[split:]]
        for key in ("desc", "output_stack_traces"):
            entries = output.meta.get(key)
            if isinstance(entries, (list, tuple)) and len(entries) == len(values):
                output.meta[key] = [entries[i] for i in order]
        output.args = ((*values[:split], *self._planes, *(values[i] for i in kept[split:])),)
