"""Compilation by Inductor with a partitioner of our own, and the settings that decide what is saved."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from functorch.compile import min_cut_rematerialization_partition  # the cut that all of this starts from
from torch import fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn  # base class Inductor asserts

__all__ = [
    "CustomPartitionerFn",
    "GraphRun",
    "activation_memory_budget",
    "bypass_caches",
    "cache_folder",
    "cheap_recomputation",
    "compile_with_inductor",
    "donate_nothing",
    "has_a_budget",
    "inductor_options",
    "keep_order",
    "keeps_rounding",
    "lays_channels_last",
    "min_cut_rematerialization_partition",
    "no_budget_of_zero",
    "no_buffer_donated",
    "partition_only",
    "partition_settings",
]


def cache_folder() -> str:
    """The folder of Inductor's caches."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def bypass_caches(why: str) -> NoReturn:
    """Leave a graph out of the caches of Inductor and AOTAutograd, called where they ask for a part of its key.

    To answer None, which Inductor documents for this, does not do: a partitioner's None is hashed as that of no
    partitioner, so that plain Inductor would find the graph.

    Args:
        why: For torch's log.
    """
    from torch._inductor.codecache import BypassFxGraphCache

    raise BypassFxGraphCache(why)


def partition_settings() -> str:
    """The global settings, beside the graph itself, that decide what a partition saves."""
    from torch._functorch import config

    names = sorted(n for n in dir(config) if n.startswith(("activation_memory", "ban_recompute", "recompute_views")))
    autocast = [
        (device, torch.get_autocast_dtype(device))
        for device in torch._C._autocast_supported_devices()
        if torch.is_autocast_enabled(device)
    ]
    modes = torch.is_grad_enabled(), autocast
    return f"{[(n, getattr(config, n)) for n in names]} {modes}"


def inductor_options() -> frozenset[str]:
    """Names of all Inductor options, as ``torch.compile(options=...)`` takes them."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def compile_with_inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: CustomPartitionerFn | None,
    mode: str | None,
    options: dict[str, Any],
) -> Callable[..., Any]:
    """``torch.compile(backend="inductor", mode=mode, options=options)`` with our partitioner, or with torch's own.

    torch's own wrapper resolves the mode and checks option names and types.
    """
    from torch._inductor.compile_fx import compile_fx

    wrapper: Any = torch._TorchCompileInductorWrapper(mode, options, None)  # type: ignore[no-untyped-call,unused-ignore]
    patches = {**wrapper.config, "custom_partitioner_fn": partitioner}
    with _donation_by_choice():
        compiled: Any = compile_fx(gm, list(example_inputs), inner_compile=_in_own_order, config_patches=patches)
    runnable: Callable[..., Any] = compiled
    return runnable


_NOTHING_DONATED = "fewbit_donates_nothing"
_OWN_ORDER = "fewbit_keeps_its_order"


def keep_order(backward: fx.GraphModule) -> None:
    """Let the kernels of this graph run in its own order, in which what is decoded is so where it is first read.

    Inductor takes of some orders the one whose peak it predicts to be the least. It counts what is within a kernel and
    never written, as most of a decode is: by that, to decode all layers first made no difference.
    """
    backward.meta[_OWN_ORDER] = True


def _in_own_order(graph: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """Inductor's compilation of one graph, where :func:`keep_order` is heard."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    with config.patch(reorder_for_peak_memory=False) if graph.meta.get(_OWN_ORDER) else contextlib.nullcontext():
        return compile_fx_inner(graph, *args, **kwargs)


def donate_nothing(forward: fx.GraphModule) -> None:
    """Let the backward of this forward overwrite no saved tensor, so that it may run with retain_graph=True."""
    forward.meta[_NOTHING_DONATED] = True


@contextlib.contextmanager
def _donation_by_choice() -> Iterator[None]:
    """Let :func:`donate_nothing` be heard while a graph is compiled.

    AOTAutograd donates saved tensors by a rule of its own, which no partitioner has a say in. To switch its setting
    off for one graph does not do: the backward then has None for a list, which its check takes for a donation.
    """
    from torch._functorch._aot_autograd import graph_compile as module

    graph_compile: Any = module
    rule = graph_compile.collect_bw_donated_buffer_idxs

    def collect(forward: fx.GraphModule, backward: fx.GraphModule, metadata: Any) -> list[int]:
        return [] if forward.meta.get(_NOTHING_DONATED) else rule(forward, backward, metadata)

    graph_compile.collect_bw_donated_buffer_idxs = collect
    try:
        yield
    finally:
        graph_compile.collect_bw_donated_buffer_idxs = rule


def cheap_recomputation(*, all_unmarked: bool) -> AbstractContextManager[None]:
    """Let torch's min-cut compute operations again wherever that saves memory.

    These are the rules that it lifts itself, one after another, when a budget of activation memory asks for less.

    Args:
        all_unmarked: Whether it may do so with any operation that is not marked ``MUST_SAVE``: not just with those on
            its own list, and also with what reads a tensor that is read far before.
    """
    rules = {"ban_recompute_long_fusible_chains": False, "ban_recompute_materialized_backward": False}
    if all_unmarked:
        rules |= {"ban_recompute_not_in_allowlist": False, "ban_recompute_used_far_apart": False}
    patched: AbstractContextManager[None] = torch._functorch.config.patch(rules)
    return patched


def activation_memory_budget(budget: float) -> AbstractContextManager[None]:
    """Let torch's partitioner take this share of the activation memory that it takes by default."""
    patched: AbstractContextManager[None] = torch._functorch.config.patch(activation_memory_budget=budget)
    return patched


def has_a_budget(graph: fx.Graph) -> bool:
    """Whether the user asks torch's partitioner for less activation memory than its default takes.

    For all graphs, or for a region: torch then notes the budget on each of its nodes.
    """
    of_region = getattr(torch.fx.traceback, "_get_memory_budget_annotation", lambda node: None)  # not in 2.11
    return torch._functorch.config.activation_memory_budget < 1 or any(
        of_region(n) is not None or n.meta.get("memory_budget") is not None for n in graph.nodes
    )


def no_budget_of_zero() -> AbstractContextManager[None]:
    """Let a budget of 0 be the least above it: of 0 torch saves the inputs, whatever is marked to be saved."""
    budget = torch._functorch.config.activation_memory_budget
    return activation_memory_budget(budget or sys.float_info.min)


def keeps_rounding() -> bool:
    """Whether a GPU's kernel that saves a number in bfloat16 goes on with it as saved, not as it was before.

    Inductor of torch 2.11 never does, later ones do unless a setting says otherwise.
    """
    from torch._inductor import config

    return bool(getattr(config, "emulate_precision_casts_on_saved_tensors", False))


def lays_channels_last(forward: fx.GraphModule) -> bool:
    """Whether Inductor lays the tensors around a forward's convolutions out with channels last."""
    from torch._inductor.graph import GraphLowering

    return bool(GraphLowering.decide_layout_opt(forward, is_inference=False))


def no_buffer_donated() -> AbstractContextManager[None]:
    """Compile backwards that may run again and again, as a benchmark repeats them."""
    patched: AbstractContextManager[None] = torch._functorch.config.patch(donated_buffer=False)
    return patched


class GraphRun(fx.Interpreter):
    """Runs a graph in plain ATen, with random numbers by their seeds.

    Outside of its kernels Inductor's operators do without the seed: a mask that the backward computes again would be
    another.
    """

    @contextlib.contextmanager
    def _set_current_node(self, node: fx.Node) -> Iterator[None]:
        """Leave alone what torch notes of the node being traced: it is global, and another thread may trace just now.

        Nothing is traced here. (Read in torch 2.11, 2.13 and 2.15.)
        """
        yield

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a node that calls a function."""
        prims = torch.ops.prims
        if target is torch.ops.aten.view.default:
            target = torch.ops.aten.reshape.default  # as Inductor has it, for a tensor may lie otherwise than is stated
        if target not in (prims.inductor_random.default, prims.inductor_randint.default):
            return super().call_function(target, args, kwargs)
        (seed,) = (a for a in args if isinstance(a, torch.Tensor))
        with torch.random.fork_rng([seed.device] if seed.device.type != "cpu" else []):
            torch.manual_seed(int(seed))
            return target(*args, **kwargs)


def partition_only(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: CustomPartitionerFn | None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Take a graph through AOTAutograd and the partition as Inductor would, and run it by plain ATen operations.

    Args:
        gm, example_inputs: As a backend is given them.
        partitioner: In place of torch's own; None for that.
        options: Of Inductor, that decide what torch's own partition saves.
    """
    from torch._inductor.compile_fx import compile_fx

    def run_eagerly(graph: fx.GraphModule, _inputs: Sequence[Any], **_kwargs: Any) -> Any:
        from functorch.compile import make_boxed_func

        return make_boxed_func(GraphRun(graph).run)

    with torch._functorch.config.patch(enable_autograd_cache=False):  # its entries need kernels
        compiled: Any = compile_fx(
            gm,
            list(example_inputs),
            inner_compile=run_eagerly,
            config_patches={**(options or {}), "custom_partitioner_fn": partitioner},
        )
    runnable: Callable[..., Any] = compiled
    return runnable
