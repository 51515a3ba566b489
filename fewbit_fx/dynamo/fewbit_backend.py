"""The torch.compile backend."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fewbit_fx.config import FewBitConfig
from fewbit_fx.dynamo.listener import Listener
from fewbit_fx.dynamo.record_file import RecordFile
from fewbit_fx.dynamo.records_by_model import History, graph_identity
from fewbit_fx.passes.faults import GRAPH_EXACT, NO_REPORT, Faults
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.passes.pipeline import require_pass_names
from fewbit_fx.passes.provenance import module_paths
from fewbit_fx.passes.record import SiteRecord
from fewbit_fx.passes.representations import Proposal
from fewbit_fx.reporting.report import Report
from fewbit_fx.torch_private.dynamo import compile_id, compiled_callable
from fewbit_fx.torch_private.inductor import compile_with_inductor, inductor_options
from fewbit_fx.torch_private.inputs import kept_by_their_makers

_REORDERING = "reorder_for_peak_memory"  # Inductor's option: who gives it, whatever its value, has Inductor's way


class FewBitBackend:
    """A backend for ``torch.compile(model, backend=...)``: Inductor, with few-bit saved tensors.

    Made by :func:`backend`; its own report covers just the graphs that it compiled.
    """

    __name__ = "fewbit"  # what torch's messages call the backend

    def __init__(
        self, config: FewBitConfig, mode: str | None, options: Mapping[str, Any], proposals: Sequence[Proposal] = ()
    ) -> None:
        require_pass_names(config.disable)
        self.config = config
        self._proposals = tuple(proposals)
        self._mode = mode
        self._options = dict(options)
        self._history = History()

    def __repr__(self) -> str:
        return f"fewbit_fx.backend({self.config!r}, mode={self._mode!r}, options={self._options!r})"

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Called by Dynamo once per graph, with what torch.compile was given beside the backend.

        Args:
            gm: Dynamo's graph.
            example_inputs: Its inputs.
            mode: A mode of torch.compile.
            options: Options of fewbit and of Inductor, and ``"mode"``.
        """
        options = dict(options or {})
        mode = options.pop("mode", mode)  # torch.compile takes either a mode or options
        config, inductor = split_options(options, self.config)
        options = {**self._options, **inductor}
        listener, faults = Listener(), Faults(config.strict)
        partitioner, file = None, None
        with faults.of("the look at Dynamo's graph", GRAPH_EXACT):
            kept, modules = kept_by_their_makers(gm, example_inputs), module_paths(gm)
            partitioner = FewBitPartitioner(
                config, listener.record, kept, self._proposals, listener.observe, modules, _REORDERING not in options
            )
        key = partitioner.cache_key() if partitioner else None
        with faults.of("the file of the report", NO_REPORT):
            if key:
                file = listener.file = RecordFile(gm, example_inputs, key)
        compiled = compile_with_inductor(gm, example_inputs, partitioner, mode or self._mode, options)
        with faults.of("the report", NO_REPORT):
            identity = graph_identity(gm, example_inputs, compile_id())
            records = listener.records or (file.read(compile_id()) if file else [])
            for history in (self._history, _all_backends):
                history.add(compiled_callable(), identity, records)
        faults.warn()
        return compiled

    def last_report(self) -> Report:
        """The report of the model that this backend compiled last; see :func:`fewbit_fx.last_report`."""
        return self._history.report()

    def all_sites(self) -> tuple[SiteRecord, ...]:
        """The sites of all models that this backend compiled and that live still."""
        return self._history.sites()


_all_backends = History()


def last_report() -> Report:
    """The report of the model that a fewbit backend compiled last in this process, with the totals of others.

    A model is what was handed to torch.compile, with all its graphs; a recompiled graph replaces its predecessor.
    Layers that are compiled one by one are models of their own, of which those that share compiled code count once.
    Empty before the first forward that requires gradients.

    Examples:
        >>> import torch, fewbit_fx
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
        >>> compiled = torch.compile(model, backend="fewbit")
        >>> compiled(torch.randn(128, 32)).sum().backward()
        >>> report = fewbit_fx.last_report()
        >>> report.model, report.plain_bytes, report.fewbit_bytes
        ('Sequential', 81920, 25088)
    """
    return _all_backends.report()


def backend(
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    proposals: Sequence[Proposal] = (),
    **fewbit: Any,
) -> FewBitBackend:
    """A backend object for ``torch.compile(model, backend=fewbit_fx.backend(bits=3))``.

    Args:
        mode: A mode of torch.compile, such as ``"max-autotune"``.
        options: Any Inductor options, and fewbit options too.
        proposals: Representations of your own, asked before ours: see ``fewbit_fx.passes.representations``.
        **fewbit: Options of :class:`fewbit_fx.FewBitConfig`.

    Raises:
        TypeError, ValueError: An unknown option, or one with a value that is not allowed.

    Examples:
        >>> import torch, fewbit_fx
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
        >>> backend = fewbit_fx.backend(value_bits=4, mode="max-autotune-no-cudagraphs")
        >>> compiled = torch.compile(model, backend=backend)
        >>> compiled(torch.randn(128, 32)).sum().backward()
        >>> [(site.name, site.bits) for site in backend.last_report().sites if site.bits]
        [('0.factor', 4)]
    """
    config, inductor = split_options({**(options or {}), **fewbit}, FewBitConfig())
    return FewBitBackend(config, mode, inductor, proposals)


def split_options(options: Mapping[str, Any], config: FewBitConfig) -> tuple[FewBitConfig, dict[str, Any]]:
    """Split a flat mapping into fewbit's configuration (on top of ``config``) and Inductor's options.

    Raises:
        ValueError: A name that is neither's, or ``custom_partitioner_fn``, which fewbit itself needs.
    """
    ours = {k: v for k, v in options.items() if k in FewBitConfig.option_names()}
    theirs, known = dict[str, Any](), inductor_options()
    for given, value in ((k, v) for k, v in options.items() if k not in ours):
        name = given.replace("-", "_")  # torch takes either
        if name == "custom_partitioner_fn":
            raise ValueError(
                f"option {given!r} is {value!r}; it is not allowed, because fewbit is a partitioner itself"
            )
        if name not in known:
            raise ValueError(_unknown_option(given, value, known))
        theirs[name] = value
    return config.updated(ours), theirs


def _unknown_option(name: str, value: object, inductor: frozenset[str]) -> str:
    ours = FewBitConfig.option_names()
    near = difflib.get_close_matches(name, [*ours, *inductor], n=3)
    hint = f" (did you mean {', '.join(map(repr, near))}?)" if near else ""
    return (
        f"unknown option {name!r} with value {value!r}{hint}; allowed are the fewbit options "
        f"{', '.join(ours)}, and any option of torch._inductor.config"
    )


fewbit = backend()  # what torch.compile(backend="fewbit") calls
