"""Every use of torch's private API, each with its reason. Checked on torch 2.11, 2.13 and 2.15.

Nothing else in fewbit-fx imports from a ``torch._*`` module or reads a private attribute of torch.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import peek_interpreter_stack  # None outside of torch.func's transforms
from torch._dynamo import register_backend  # the registry behind torch.compile(backend="name")
from torch._functorch.partitioners import _size_of
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import CompileContext, tracing
from torch._inductor.custom_graph_pass import CustomPartitionerFn  # base class Inductor asserts
from torch._subclasses.fake_tensor import FakeTensor

# Generates code once, when it is called, not at each change.
from torch.fx._lazy_graph_module import _make_graph_module as make_graph_module
from torch.fx.experimental.proxy_tensor import make_fx, py_sym_types
from torch.fx.experimental.symbolic_shapes import (
    free_symbols,
    free_unbacked_symbols,
    is_nested_int,
    statically_known_true,  # reads, never adds a guard
)
from torch.utils._python_dispatch import (
    _disable_current_modes,
    is_in_torch_dispatch_mode,
    is_traceable_wrapper_subclass,
)

__all__ = [
    "CustomPartitionerFn",
    "bare_symbol",
    "cache_folder",
    "compile_id",
    "compile_with_inductor",
    "compiled_callable",
    "donate_nothing",
    "has_size_from_data",
    "inductor_decompositions",
    "inductor_options",
    "hint",
    "is_plain",
    "is_symbol",
    "kept_by_their_makers",
    "make_graph_module",
    "mode_of",
    "nbytes",
    "neutral_hooks",
    "partition_only",
    "partition_settings",
    "real_mode",
    "register_backend",
    "runs_compiled",
    "share_hooks",
    "size_symbols",
    "statically_known_true",
    "storage_key",
    "storage_nbytes",
    "trace_for_all_shapes",
    "version",
    "without_hooks",
]


@contextlib.contextmanager
def real_mode() -> Iterator[None]:
    """Leave whatever trace or transform is under way, with its fake tensor mode, to compute on real numbers."""
    with _disable_current_modes(), tracing(None), temporarily_clear_interpreter_stack():
        yield


def neutral_hooks() -> AbstractContextManager[None]:
    """Keep saved tensors from the hooks of others. Where hooks are forbidden, as in torch.func, there are none."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


def mode_of(x: Tensor) -> AbstractContextManager[Any]:
    """The mode in which tensors to go with x are made: its own if x is fake."""
    return x.fake_mode if isinstance(x, FakeTensor) else contextlib.nullcontext()


def runs_compiled(*tensors: Tensor) -> bool:
    """Whether compiled code may be called on these tensors.

    Not on fake, batched and other special ones, nor on those without data; nor where a dispatch mode or a
    transform of torch.func wants to see each operation.
    """
    observed = is_in_torch_dispatch_mode() or peek_interpreter_stack() is not None
    return not observed and all(type(t) in (Tensor, nn.Parameter) and t.device.type != "meta" for t in tensors)


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is a strided one: not nested, sparse or MKL-DNN's, nor a wrapper of others such as DTensor.

    ``is_traceable_wrapper_subclass`` of ``torch.utils._python_dispatch`` asks the tensor; traced by Dynamo, only
    its class has the answer.
    """
    return x.layout == torch.strided and not x.is_nested and not hasattr(type(x), "__tensor_flatten__")


def version(x: Tensor) -> int:
    """How often a tensor has been written to."""
    return x._version


def kept_by_their_makers(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[int, ...]:
    """Positions of a graph's inputs whose storage is kept for its own backward by the operation that made them.

    Behind a graph break the inputs of a graph are the outputs of another, which may have saved them. Hooks on saved
    tensors are not run: they may compute a whole checkpoint again. Where AOTAutograd will number the inputs in
    another way, none are named.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs, real or fake.
    """
    tensors = [x for x in example_inputs if isinstance(x, Tensor)]
    if any(True for _ in gm.parameters()) or any(map(is_traceable_wrapper_subclass, tensors)):
        return ()
    return tuple(i for i, x in enumerate(example_inputs) if isinstance(x, Tensor) and _is_kept_by_its_maker(x))


def _is_kept_by_its_maker(x: Tensor) -> bool:
    if isinstance(x, FakeTensor) or x.layout != torch.strided:
        return False
    pointer, node = x.untyped_storage().data_ptr(), x.grad_fn
    while node is not None:
        kept = list(_unhooked_saved_tensors(node))
        if kept or len(node.next_functions) != 1:  # else it may be a view, and its base kept
            return any(t.untyped_storage().data_ptr() == pointer for t in kept)
        node = node.next_functions[0][0]
    return False


def _unhooked_saved_tensors(node: Any) -> Iterator[Tensor]:
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            saved = getattr(node, name)
            for raw in saved if isinstance(saved, (tuple, list)) else (saved,):
                if raw.unpack_hook is None and isinstance(raw.data, Tensor) and raw.data.layout == torch.strided:
                    yield raw.data


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let a module have the hooks of another, those that come later included, and its mode."""
    for name, value in vars(old).items():
        if "hook" in name or name == "training":
            setattr(new, name, value)


def without_hooks(module: nn.Module) -> nn.Module:
    """A shallow copy without hooks."""
    bare = copy.copy(module)
    for name, value in vars(nn.Module()).items():
        if "hook" in name:
            setattr(bare, name, value)
    return bare


def nbytes(node: fx.Node) -> int:
    """Bytes of a node's value by the partitioner's own count, with hints for symbolic sizes."""
    return int(_size_of(node))


def storage_key(node: fx.Node) -> object:
    """The same for two nodes exactly if they are views of one storage."""
    value = node.meta.get("val")
    if isinstance(value, FakeTensor):
        return value.untyped_storage()._cdata  # fake storages have no data_ptr to compare
    return node


def trace_for_all_shapes(function: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """The ATen operations of a function, with symbolic shapes; real tensors it closes over are constants.

    Tensors that it creates come to be on the device of its argument. The result is a plain Python function:
    Dynamo traces into one wherever it meets it, and not into a GraphModule in a constant's place.
    """
    traced = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(example)
    traced.graph.eliminate_dead_code()
    _follow_the_device(traced.graph, example.device)
    code = traced.graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    constants = SimpleNamespace(**{n.target: getattr(traced, n.target) for n in traced.graph.find_nodes(op="get_attr")})
    run, dims = namespace["forward"], example.dim()
    if any(n.target is torch.ops.aten.sym_size.int for n in traced.graph.nodes):  # it holds for as many dimensions
        return lambda x: run(constants, x.reshape(*[1] * (dims - 1), -1)).reshape(x.shape)
    return lambda x: run(constants, x)


def _follow_the_device(graph: fx.Graph, traced_on: torch.device) -> None:
    """Read the device of new tensors off the argument, where the trace has the example's."""
    (argument,) = graph.find_nodes(op="placeholder")
    with graph.inserting_after(argument):
        device = graph.call_function(getattr, (argument, "device"))
    for node in graph.nodes:
        if node.kwargs.get("device") == traced_on:
            node.kwargs = {**node.kwargs, "device": device}
    if not device.users:
        graph.erase_node(device)


def storage_nbytes(node: fx.Node) -> int:
    """Bytes of the whole storage of a node's value: a view keeps all of it alive, and an expanded one no more."""
    value = node.meta.get("val")
    if isinstance(value, FakeTensor):
        return hint(value.untyped_storage().nbytes())
    return nbytes(node)


def inductor_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """The decompositions that a graph after AOTAutograd has been through; Inductor expects no others."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def has_size_from_data(value: Tensor) -> bool:
    """Whether a size or stride follows from data, as that of ``x[mask]`` and of jagged dimensions does.

    Such a symbol has no value when compiling, and a trace of new operations on it cannot bind it.
    """
    return any(map(is_nested_int, value.shape)) or bool(free_unbacked_symbols(value))


def size_symbols(value: Tensor) -> frozenset[object]:
    """The symbols in the sizes and strides of a tensor."""
    return frozenset(free_symbols(value))


def bare_symbol(value: Any) -> object | None:
    """The symbol that a symbolic number is; None for an expression, from which its symbols may not follow."""
    expression = value.node.expr if isinstance(value, torch.SymInt) and value.node.is_symbolic() else None
    return expression if expression is not None and expression.is_Symbol else None


def is_symbol(node: fx.Node) -> bool:
    """Whether a node's value is a symbolic size or number, not a tensor."""
    return isinstance(node.meta.get("val"), py_sym_types)


def hint(size: int | torch.SymInt) -> int:
    """The size itself, or the size at which a symbolic one was first seen."""
    if isinstance(size, int):
        return size
    found = size.node.hint
    return int(found) if found is not None else 4096  # the partitioner's own fallback


def cache_folder() -> str:
    """Where Inductor keeps its caches."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


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


def compile_id() -> str:
    """Dynamo's id of the compilation under way, such as ``0/1`` (frame/recompile), or ``-``."""
    current = CompileContext.current_compile_id()
    return str(current) if current is not None else "-"


def compiled_callable() -> Callable[..., Any] | None:
    """What was handed to torch.compile, of the compilation under way, or None if that is not found.

    Dynamo does not tell a backend. But the wrapper that torch.compile returns is on the stack, and holds it in
    its free variable ``fn``: a function or, of a module, a bound method. Modules whose forward is torch's own are
    wrapped once more, by ``wrap_inline``.
    """
    frame = sys._getframe()
    while frame.f_code.co_name != "compile_wrapper" or frame.f_globals.get("__name__") != "torch._dynamo.eval_frame":
        if frame.f_back is None:
            return None
        frame = frame.f_back
    found: Callable[..., Any] | None = frame.f_locals.get("fn")
    if isinstance(found, FunctionType) and found.__globals__.get("__name__") == "torch._dynamo.external_utils":
        found = getattr(found, "__wrapped__", found)
    return found


def inductor_options() -> frozenset[str]:
    """Names of all Inductor options, as ``torch.compile(options=...)`` takes them."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def compile_with_inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: CustomPartitionerFn,
    mode: str | None,
    options: dict[str, Any],
) -> Callable[..., Any]:
    """``torch.compile(backend="inductor", mode=mode, options=options)`` with our partitioner.

    torch's own wrapper resolves the mode and checks option names and types.
    """
    wrapper: Any = torch._TorchCompileInductorWrapper(mode, options, None)  # type: ignore[no-untyped-call,unused-ignore]
    wrapper.config["custom_partitioner_fn"] = partitioner
    with _donation_by_choice():
        compiled: Callable[..., Any] = wrapper(gm, list(example_inputs))
    return compiled


_NOTHING_DONATED = "fewbit_donates_nothing"


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


def partition_only(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: CustomPartitionerFn,
) -> Callable[..., Any]:
    """The same way of a graph up to and with the partition, then plain ATen instead of kernels."""
    from torch._inductor.compile_fx import compile_fx

    def run_eagerly(graph: fx.GraphModule, _inputs: Sequence[Any], **_kwargs: Any) -> Any:
        from functorch.compile import make_boxed_func

        return make_boxed_func(graph.forward)

    with torch._functorch.config.patch(enable_autograd_cache=False):  # its entries need kernels
        compiled: Any = compile_fx(
            gm,
            list(example_inputs),
            inner_compile=run_eagerly,
            config_patches={"custom_partitioner_fn": partitioner},
        )
    runnable: Callable[..., Any] = compiled
    return runnable
