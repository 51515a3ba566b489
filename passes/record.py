"""What the passes did to one graph, as plain data for whoever reports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fewbit_fx.torch_private.dynamo import compile_id
from fewbit_fx.torch_private.sizes import hint

from .attribution import Leftover, Share, attribute
from .graph import value_of
from .partition import Partition
from .provenance import module_path, source_line
from .representations import Decision, Exact
from .sites import Site, Unreadable


@dataclass(frozen=True)
class SiteRecord:
    """One site and what happened to it.

    Attributes:
        module: Path of the module in the model, such as ``blocks.0.mlp``, or "" for the model itself.
        source_line: ``file:line`` of the user's code, or "".
        function: Recognised name such as ``gelu``, or ``custom``, ``dropout``, ``mask``, ``product``.
        shape: Of the tensor; symbolic sizes as text.
        dtype: Of the tensor, such as ``bfloat16``.
        action: ``coded in 3 bits``, ``exact one-bit mask`` or ``left exact``.
        reason: Why it was left exact, or "".
        bytes_before: Bytes of the saved storages that count for this row under torch.compile's own partition:
            those that the derivative would otherwise be computed from. Each storage counts for one row, so 0
            where nothing is saved for this site, or where it counts for an earlier one.
        bytes_after: The same under the partition that is used, codes included.
        relative_error: Of the derivative, root mean square over the codebook's density; 0 if exact.
        levels: The codebook's levels; empty if exact.
        small: Whether the tensor has fewer than ``min_numel`` elements.
    """

    module: str
    source_line: str
    function: str
    shape: tuple[int | str, ...]
    dtype: str
    action: str
    reason: str
    bytes_before: int
    bytes_after: int
    relative_error: float
    levels: tuple[float, ...] = ()
    small: bool = False


@dataclass(frozen=True)
class OtherRecord:
    """One storage that is saved for the backward and counts for no site.

    Attributes:
        module: Path of the module that made it, or "" for the model itself and its inputs.
        source_line: ``file:line`` of the user's code, or "".
        readers: The operations of the backward that bring it together with a gradient, such as ``mm`` or
            ``native_layer_norm_backward``, sorted. Values recomputed from it are followed to theirs.
        shape: Of a saved tensor in it; symbolic sizes as text.
        dtype: Of this tensor.
        bytes_before: Bytes of the storage if torch.compile's own partition saves it, else 0.
        bytes_after: Bytes of the storage if the partition that is used saves it, else 0.
        small: Whether the tensor has fewer than ``min_numel`` elements.
    """

    module: str
    source_line: str
    readers: tuple[str, ...]
    shape: tuple[int | str, ...]
    dtype: str
    bytes_before: int
    bytes_after: int
    small: bool = False


@dataclass(frozen=True)
class GraphRecord:
    """One partitioned graph.

    Attributes:
        compile_id: Dynamo's id, ``frame/recompilation``.
        plain_bytes: Bytes saved for the backward by torch.compile's own partition, each storage
            once, without parameters and buffers.
        fewbit_bytes: The same for the partition that is used.
        sites: Every site looked at, in graph order.
        note: Why the whole graph was left exact, or "".
        others: All else that is saved. The bytes before of all sites and others sum to ``plain_bytes``, their
            bytes after to ``fewbit_bytes``, by hint where sizes are symbolic.
        pass_seconds: Wall time of fewbit's own passes, without torch's cut, when the graph was
            compiled, in seconds. Not compared.
    """

    compile_id: str
    plain_bytes: int
    fewbit_bytes: int
    sites: tuple[SiteRecord, ...]
    note: str = ""
    others: tuple[OtherRecord, ...] = ()
    pass_seconds: float = field(default=0.0, compare=False)

    @property
    def rows(self) -> tuple[SiteRecord | OtherRecord, ...]:
        """The sites, then all else that is saved."""
        return self.sites + self.others


def graph_record(
    plain: Partition,
    chosen: Partition,
    plan: Mapping[Site, Decision],
    unreadable: Sequence[Unreadable],
    min_numel: int,
) -> GraphRecord:
    """The record of one graph.

    Args:
        plain: torch.compile's own partition.
        chosen: The one in use.
        plan: The sites, in graph order, with their final representations.
        unreadable: Regions whose derivative could not be read off the graph.
        min_numel: Tensors of fewer elements are small.
    """
    coded = [site for site, representation in plan.items() if not isinstance(representation, Exact)]
    exact = [site for site, representation in plan.items() if isinstance(representation, Exact)]
    whose = attribute(plain, chosen, coded, [*exact, *unreadable])
    sites = [_site_record(site, plan[site], whose.shares[site], min_numel) for site in plan]
    sites += [_unreadable_record(region, whose.shares[region], min_numel) for region in unreadable]
    others = tuple(_other_record(leftover, min_numel) for leftover in whose.leftovers)
    return GraphRecord(compile_id(), plain.saved_bytes(), chosen.saved_bytes(), tuple(sites), others=others)


def unexamined_record(plain: Partition, note: str) -> GraphRecord:
    """The record of a graph that is left as it is, for the reason in the note."""
    size = plain.saved_bytes()
    everything = OtherRecord("", "", (), (), "", size, size)
    return GraphRecord(compile_id(), size, size, (), note, (everything,))


def _site_record(site: Site, decision: Decision, share: Share, min_numel: int) -> SiteRecord:
    return SiteRecord(
        **_whereabouts(site.anchor),
        **_tensor(site.stored, min_numel),
        bytes_before=share.before,
        bytes_after=share.after,
        function=site.function,
        action=decision.action,
        reason=decision.reason if isinstance(decision, Exact) else "",
        relative_error=0.0 if isinstance(decision, Exact) else decision.relative_error,
        levels=() if isinstance(decision, Exact) else decision.levels,
    )


def _unreadable_record(region: Unreadable, share: Share, min_numel: int) -> SiteRecord:
    return SiteRecord(
        **_whereabouts(region.exit),
        **_tensor(region.exit, min_numel),
        bytes_before=share.before,
        bytes_after=share.after,
        function="custom",
        action=Exact.action,
        reason=region.reason,
        relative_error=0.0,
    )


def _other_record(leftover: Leftover, min_numel: int) -> OtherRecord:
    return OtherRecord(
        **_whereabouts(leftover.node),
        **_tensor(leftover.node, min_numel),
        bytes_before=leftover.share.before,
        bytes_after=leftover.share.after,
        readers=leftover.readers,
    )


def _whereabouts(node: fx.Node) -> dict[str, Any]:
    return {"module": module_path(node), "source_line": source_line(node)}


def _tensor(node: fx.Node, min_numel: int) -> dict[str, Any]:
    value = value_of(node)
    return {
        "shape": tuple(n if isinstance(n, int) else str(n) for n in value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "small": hint(value.numel()) < min_numel,
    }
