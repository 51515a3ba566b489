"""What the passes did to one graph, as plain data for whoever reports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fewbit_fx.torch_private.dynamo import compile_id
from fewbit_fx.torch_private.sizes import hint

from .bytes_per_row import Leftover, Share, attribute
from .gain import NOT_SAVED
from .graph import value_of
from .partition import Partition
from .pipeline import Work
from .provenance import module_path, source_line
from .reasons import Reason
from .representations import Decision, Exact
from .sites import Site, Unreadable
from .splice import description


@dataclass(frozen=True)
class SiteRecord:
    """One site and what happened to it.

    Attributes:
        module: Path of the module in the model, such as ``blocks.0.mlp``, or "" for the model itself.
        source_line: ``file:line`` of the user's code, or "".
        name: By which the option ``skip`` and the saved tensors call the site, such as ``blocks.0.mlp.gelu``.
        function: Recognised name such as ``gelu``, or ``custom``, ``dropout``, ``mask``, ``product``.
        shape: The shape of the tensor; symbolic sizes as text.
        dtype: The dtype of the tensor, such as ``bfloat16``.
        form: The form of its representation, such as ``codes`` or ``mask``; "" if it was left exact.
        bits: Bits stored per element; 0 if it was left exact.
        reason: Why it was left exact; None if it was not.
        bytes_before: Bytes of the saved storages that count for this row under torch.compile's own partition:
            those that the derivative would otherwise be computed from. Each storage counts for one row, so 0
            where nothing is saved for this site, or where it counts for an earlier one.
        bytes_after: The same under the partition that is used, codes included.
        relative_error: The predicted error of the derivative: root mean square over the codebook's density, relative
            to that of the derivative. 0 if exact.
        levels: The codebook's levels; empty if exact.
        small: Whether the tensor has fewer than ``min_numel`` elements.
    """

    module: str
    source_line: str
    name: str
    function: str
    shape: tuple[int | str, ...]
    dtype: str
    form: str
    bits: int
    reason: Reason | None
    bytes_before: int
    bytes_after: int
    relative_error: float
    levels: tuple[float, ...] = ()
    small: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether the site was left as it is."""
        return not self.form


@dataclass(frozen=True)
class OtherRecord:
    """One storage that is saved for the backward and counts for no site.

    Attributes:
        module: Path of the module that made it, or "" for the model itself and its inputs.
        source_line: ``file:line`` of the user's code, or "".
        readers: The operations of the backward that bring it together with a gradient, such as ``mm`` or
            ``native_layer_norm_backward``, sorted. Values recomputed from it are followed to theirs.
        shape: The shape of a saved tensor in the storage; symbolic sizes as text.
        dtype: The dtype of this tensor.
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
        recipe: The option of this name.
        computes_again: Whether the cut is a leaner one than torch.compile's own, so that the backward computes
            pointwise operations again.
        note: Why the whole graph was left exact; None if it was looked at.
        others: All else that is saved. The bytes before of all sites and others sum to ``plain_bytes``, their
            bytes after to ``fewbit_bytes``, by hint where sizes are symbolic.
        pass_seconds: Wall time of fewbit's own work, without torch's cut, when the graph was
            compiled, in seconds. Not compared.
        pass_times: The names of the passes, each with the seconds that it took. Not compared.
    """

    compile_id: str
    plain_bytes: int
    fewbit_bytes: int
    sites: tuple[SiteRecord, ...]
    note: Reason | None = None
    others: tuple[OtherRecord, ...] = ()
    recipe: str = ""
    computes_again: bool = False
    pass_seconds: float = field(default=0.0, compare=False)
    pass_times: tuple[tuple[str, float], ...] = field(default=(), compare=False)

    @property
    def rows(self) -> tuple[SiteRecord | OtherRecord, ...]:
        """The sites, then all else that is saved."""
        return self.sites + self.others


def graph_record(plain: Partition, work: Work, seconds: Mapping[str, float]) -> GraphRecord:
    """The record of one graph.

    Args:
        plain: torch.compile's own partition.
        work: What the passes found out and did, perhaps with another cut.
        seconds: That each pass took, by name.
    """
    min_numel = work.config.min_numel
    coded = work.coded
    reported = [site for site, done in work.plan.items() if not _is_gone(site, done)]
    exact = [site for site in reported if site not in coded]
    whose = attribute(plain, work.plain, work.chosen, coded, [*exact, *work.unreadable])
    told = {(work.plan[site], description(site.stored)) for site in exact if not site.is_last_resort}
    sites = [
        _site_record(site, work.sites[site], work.plan[site], whose.shares[site], min_numel)
        for site in reported
        if not (site.is_last_resort and whose.shares[site] == Share(0, 0))  # its bytes are in another row
        or (work.plan[site], description(site.stored)) not in told
    ]
    sites += [_unreadable_record(region, whose.shares[region], min_numel) for region in work.unreadable]
    return GraphRecord(
        compile_id(),
        plain.saved_bytes(),
        work.chosen.saved_bytes(),
        tuple(sites),
        others=tuple(_other_record(leftover, min_numel) for leftover in whose.leftovers),
        recipe=work.config.recipe,
        computes_again=work.plain is not plain and work.plain.saved_bytes() < plain.saved_bytes(),
        pass_times=tuple(seconds.items()),
    )


def _is_gone(site: Site, decision: Decision) -> bool:
    """Whether a saved tensor is of no interest, because what is coded elsewhere leaves nobody to read it."""
    return site.is_last_resort and isinstance(decision, Exact) and decision.reason == NOT_SAVED


def unexamined_record(plain: Partition, note: Reason) -> GraphRecord:
    """The record of a graph that is left as it is, for the reason in the note."""
    size = plain.saved_bytes()
    everything = OtherRecord("", "", (), (), "", size, size)
    return GraphRecord(compile_id(), size, size, (), note, (everything,))


def _site_record(site: Site, name: str, decision: Decision, share: Share, min_numel: int) -> SiteRecord:
    reason = decision.reason if isinstance(decision, Exact) else None
    stored = None if isinstance(decision, Exact) else decision
    return SiteRecord(
        **_whereabouts(site.anchor),
        **_tensor(site.stored, min_numel),
        bytes_before=share.before,
        bytes_after=share.after,
        name=name,
        function=site.function,
        form=stored.form if stored else "",
        bits=stored.bits if stored else 0,
        reason=reason,
        relative_error=stored.relative_error if stored else 0.0,
        levels=stored.levels if stored else (),
    )


def _unreadable_record(region: Unreadable, share: Share, min_numel: int) -> SiteRecord:
    return SiteRecord(
        **_whereabouts(region.exit),
        **_tensor(region.exit, min_numel),
        bytes_before=share.before,
        bytes_after=share.after,
        name="",
        function="custom",
        form="",
        bits=0,
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
