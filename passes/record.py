"""What the passes did to one graph, as plain data for whoever reports it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fewbit_fx.passes.graph import value_of
from fewbit_fx.passes.provenance import function_name, module_path, source_line
from fewbit_fx.passes.representation import Coded, Exact, Representation, code_bytes
from fewbit_fx.passes.sites import DerivativeSite, Site, Unreadable, anchor
from torch import fx

from fewbit_fx._torch import nbytes


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
        bytes_before: Bytes of the tensor that the derivative would otherwise be computed from.
        bytes_after: Bytes saved in its place; equal to ``bytes_before`` where left exact.
        relative_error: Of the derivative, root mean square over the codebook's density; 0 if exact.
        levels: The codebook's levels; empty if exact.
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
        pass_seconds: Wall time of fewbit's own passes, without torch's cut, when the graph was
            compiled, in seconds. Not compared.
    """

    compile_id: str
    plain_bytes: int
    fewbit_bytes: int
    sites: tuple[SiteRecord, ...]
    note: str = ""
    pass_seconds: float = field(default=0.0, compare=False)


def site_record(site: Site, representation: Representation) -> SiteRecord:
    """The record of a site and its final representation."""
    node = site.source if isinstance(site, DerivativeSite) else site.mask
    codebook = representation.codebook if isinstance(representation, Coded) else None
    return SiteRecord(
        **_whereabouts(anchor(site)),
        **_tensor(node),
        function=function_name(site),
        action=representation.label,
        reason=representation.reason if isinstance(representation, Exact) else "",
        bytes_after=code_bytes(site, representation) or nbytes(node),
        relative_error=codebook.relative_error if codebook else 0.0,
        levels=codebook.levels if codebook else (),
    )


def unreadable_record(region: Unreadable) -> SiteRecord:
    """The record of a region whose derivative could not be read off the graph."""
    return SiteRecord(
        **_whereabouts(region.exit),
        **_tensor(region.exit),
        function="custom",
        action=Exact.label,
        reason=region.reason,
        bytes_after=nbytes(region.exit),
        relative_error=0.0,
    )


def _whereabouts(node: fx.Node) -> dict[str, Any]:
    return {"module": module_path(node), "source_line": source_line(node)}


def _tensor(node: fx.Node) -> dict[str, Any]:
    value = value_of(node)
    return {
        "shape": tuple(n if isinstance(n, int) else str(n) for n in value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "bytes_before": nbytes(node),
    }
