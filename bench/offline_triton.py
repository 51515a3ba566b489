"""The Triton kernels that a GPU would get for a partitioned model, generated and compiled without a GPU.

The one module outside fewbit_fx that uses torch's private code generation; checked on torch 2.13 and 2.15.

A model is traced and partitioned on fake CPU tensors with the layout of a GPU, its two graphs are moved to
fake CUDA tensors, and Inductor's code generation runs while torch is told of one H100. Nothing is launched.
:func:`run_on_cpu` runs such graphs in plain ATen beside, for who interprets the code (tests/triton_interpreter.py).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._inductor.compile_fx import compile_fx, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from fewbit_fx.config import FewBitConfig
from fewbit_fx.passes.graph import output_values
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.passes.record import GraphRecord
from fewbit_fx.passes.rewrite import PREFIX
from fewbit_fx.passes.splice import copy_module

CUDA = torch.device("cuda", 0)
H100 = DeviceProperties(
    type="cuda",
    index=0,
    multi_processor_count=132,
    cc=90,
    major=9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    warp_size=32,
)


@dataclass(frozen=True)
class Kernel:
    """One generated kernel: its whole source, and how often it loads and stores."""

    name: str
    source: str

    @property
    def loads(self) -> int:
        return self.source.count("tl.load(")

    @property
    def stores(self) -> int:
        return self.source.count("tl.store(")


@dataclass(frozen=True)
class Generated:
    """The kernels of both graphs, and what fewbit did.

    Attributes:
        forward, backward: The kernels.
        moved_bytes: By Inductor's own count, what all operations of the forward and of the backward read and write,
            matrix products and convolutions included.
        record: The record of the graph.
    """

    forward: list[Kernel]
    backward: list[Kernel]
    moved_bytes: tuple[int, int]
    record: GraphRecord

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.forward), len(self.backward)


def generate(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, config: FewBitConfig) -> Generated:
    """The kernels of a model's forward and backward. Inputs and parameters have the dtype."""
    fake = FakeTensorMode()
    names = [name for name, _ in model.named_parameters()]
    with fake:
        given = [torch.empty(p.shape, dtype=dtype, requires_grad=p.requires_grad) for p in model.parameters()]
        given.append(torch.empty(shape, dtype=dtype, requires_grad=True))

        def run(*args: Tensor) -> tuple[Tensor]:
            return (torch.func.functional_call(model, dict(zip(names, args[:-1], strict=True)), args[-1:]),)

        joint = aot_export_joint_simple(run, given, trace_joint=True, decompositions=select_decomp_table())
    with V.set_fake_mode(fake):
        joint_graph_passes(joint)
    records: list[GraphRecord] = []
    static = list(range(len(names)))
    with fake, gpu_layout():
        partitioner = FewBitPartitioner(config, records.append)
        pair = partitioner(joint, _inputs(joint), num_fwd_outputs=1, static_lifetime_input_indices=static)
    forward, backward = (_code(_lowered(_on(CUDA, gm, fake), fake), fake) for gm in pair)
    moved_bytes = forward.moved_bytes, backward.moved_bytes
    return Generated(kernels(forward.text), kernels(backward.text), moved_bytes, records[0])


@contextlib.contextmanager
def gpu_layout() -> Iterator[None]:
    """Let the codec encode CPU tensors as it does those of a GPU."""
    choices: dict[str, Any] = {
        "bitplanes.lanes_for": (1,),
        "packing.packs_bytes": False,
        "block_scaled.packs_bytes": False,
        "magnitudes.compares_integers": True,
        "encode_decode.takes_signs": False,
        "scheme.takes_signs": False,
        "sampled_levels.takes_signs": False,
        "stochastic_levels.takes_signs": False,
    }
    with contextlib.ExitStack() as stack:
        for name, value in choices.items():
            stack.enter_context(mock.patch(f"fewbit_fx.codec.{name}", return_value=value))
        yield


@dataclass(frozen=True)
class Run:
    """One graph as it ran on the CPU, and the code that a GPU would get for it.

    Attributes:
        code: Inductor's output code, wrapper and kernels.
        constants: Tensors that it refers to by name.
        is_backward: Of which graph it is.
        inputs, outputs: Of the graph, run node by node in plain ATen.
        planes: Positions of the outputs that are codes or belong to them.
    """

    code: str
    constants: dict[str, Tensor]
    is_backward: bool
    inputs: list[Any]
    outputs: list[Any]
    planes: list[int]


def run_on_cpu(
    function: Callable[..., Any], inputs: Sequence[Any], config: FewBitConfig, dynamic: bool | None = None
) -> tuple[list[Run], GraphRecord]:
    """A function's forward, and the backward of the sum of its output, as torch.compile makes them for a GPU.

    Both run on the CPU, as the graphs that Inductor lowers: its own passes are behind them.
    """
    runs: list[Run] = []
    records: list[GraphRecord] = []

    def lower(gm: fx.GraphModule, _inputs: Sequence[Any], **kwargs: Any) -> Any:
        fake = detect_fake_mode(_inputs)
        assert fake is not None
        record_original_output_strides(gm)
        lowered = _lowered(_on(CUDA, copy_module(gm), fake), fake)
        on_cpu = _on(torch.device("cpu"), copy_module(lowered), fake)
        code = _code(lowered, fake)
        names = [n.name if isinstance(n, fx.Node) else "" for n in output_values(gm.graph)]
        planes = [i for i, name in enumerate(names) if name.startswith(PREFIX)]

        def run(args: list[Any]) -> Any:
            taken = [a.clone() if isinstance(a, Tensor) else a for a in args]
            args.clear()
            with torch.no_grad():
                outputs = fx.Interpreter(on_cpu).run(*taken)
            runs.append(Run(code.text, code.constants, bool(kwargs.get("is_backward")), taken, list(outputs), planes))
            return outputs

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        partitioner = FewBitPartitioner(config, records.append)
        compiled: Callable[..., Any] = compile_fx(
            gm, example_inputs, inner_compile=lower, config_patches={"custom_partitioner_fn": partitioner}
        )
        return compiled

    torch.compiler.reset()
    with gpu_layout(), torch._functorch.config.patch(enable_autograd_cache=False, donated_buffer=False):
        output = torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
        output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype))
    return runs, records[0]


def _inputs(gm: fx.GraphModule) -> list[Any]:
    return [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]


def _on(device: torch.device, gm: fx.GraphModule, fake: FakeTensorMode) -> fx.GraphModule:
    """The graph with all tensors on a device; it is changed."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return device if isinstance(value, torch.device) else value

    with fake:
        for node in gm.graph.nodes:
            node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), moved)
            if "val" in node.meta:
                node.meta["val"] = tree_map(moved, node.meta["val"])
    gm.recompile()
    return gm


def _lowered(gm: fx.GraphModule, fake: FakeTensorMode) -> fx.GraphModule:
    """The graph after Inductor's own passes; it is changed."""
    with pretend_cuda(), V.set_fake_mode(fake):
        post_grad_passes(gm, is_inference=False)
    gm.recompile()
    return gm


@dataclass(frozen=True)
class _Code:
    """The code of a graph, tensors that it names, and the bytes that it moves."""

    text: str
    constants: dict[str, Tensor]
    moved_bytes: int


def _code(gm: fx.GraphModule, fake: FakeTensorMode) -> _Code:
    with pretend_cuda(), V.set_fake_mode(fake):
        graph = GraphLowering(gm, example_inputs=_inputs(gm), shape_env=fake.shape_env, is_inference=False)
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            graph.run(*_inputs(gm))
            code, _ = graph.codegen()
            moved_bytes = graph.count_bytes()[0] if fake.shape_env is None else 0
    return _Code(getattr(code, "value", code), dict(graph.constants), int(moved_bytes))


def kernels(code: str) -> list[Kernel]:
    """The kernels of Inductor's output code."""
    return [Kernel(*found) for found in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL)]


class _Properties:
    major, minor, multi_processor_count, name = 9, 0, 132, "H100"
    total_memory, warp_size, gcnArchName = 80 << 30, 32, ""  # noqa: N815  (torch's names)
    regs_per_multiprocessor, max_threads_per_multi_processor, max_threads_per_block = 65536, 2048, 1024
    shared_memory_per_block_optin = 232448


@contextlib.contextmanager
def pretend_cuda() -> Iterator[None]:
    """Let Inductor's code generation see one H100."""
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda *_: _Properties()),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (DeviceProperties, "create", lambda _: H100),
        (importlib.import_module("torch.utils._triton"), "triton_hash_with_backend", lambda: "offline"),
    ]
    replaced.append(
        (importlib.import_module("torch._inductor.runtime.triton_helpers"), "set_driver_to_gpu", lambda: None)
    )
    for name in ("scheduler", "utils", "codegen.triton"):
        replaced.append((importlib.import_module(f"torch._inductor.{name}"), "has_triton", lambda *_, **__: True))
    replaced.append((importlib.import_module("torch.utils._triton"), "has_triton", lambda *_, **__: True))
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, value))
        yield


@dataclass(frozen=True)
class Resources:
    """What one configuration of a compiled kernel takes: registers and bytes of spills, a thread."""

    registers: int
    spilled: int


def compile_offline(kernel: Kernel, capability: int = 90, which: slice = slice(None)) -> list[Resources]:
    """Compile a kernel for a GPU, by default an H100, in configurations that Inductor would try, by default all."""
    import triton
    from torch._inductor.runtime import triton_heuristics
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found: list[Any] = []

    def keep(_size_hints: Any, configs: Any, triton_meta: Any, *_: Any, **__: Any) -> Any:
        return lambda function: found.append((function, configs, triton_meta)) or function

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(triton_heuristics, "cached_autotune", keep):
        file = Path(folder) / "kernel.py"
        file.write_text(kernel.source)
        spec = importlib.util.spec_from_file_location("kernel", file)
        assert spec is not None
        assert spec.loader is not None
        with pretend_cuda():
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        ((function, configs, meta),) = found
        results = []
        for config in configs[which]:
            signature, given = dict(meta["signature"]), {**meta.get("constants", {}), **config.kwargs}
            constants = {k: given[k] for k, v in signature.items() if v == "constexpr"}
            source = ASTSource(fn=function, signature=signature, constexprs=constants)
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            results.append(_resources(compiled.asm["cubin"], Path(folder)))
        return results


def _resources(cubin: bytes, folder: Path) -> Resources:
    import triton

    (folder / "kernel.cubin").write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"])
