"""Runs the code that Inductor generates for a GPU on CPU tensors: its Triton kernels in Triton's interpreter.

Triton decides when it is imported whether it interprets, so all this is in a process of its own (:func:`interpreter`).
What the interpreter lacks or does otherwise than a GPU is put in its place:

- Functions of libdevice and of ``tl.math`` are those of torch on the CPU, so that whatever differs is not theirs.
- Rounding to bfloat16 is to the nearest even, as a GPU has it; the interpreter cuts digits off.
- Reductions by a function of two elements take halves, as a GPU does; the interpreter takes single elements.
- A number that is an index may be an array of one element, which Triton 3.6 cannot take from numpy 2.4.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

Interpret = Callable[[str, dict[str, Tensor], list[Any], int], "tuple[list[Any], int]"]


@contextlib.contextmanager
def interpreter() -> Iterator[Interpret]:
    """A function that runs Inductor's output code.

    It takes the code, the tensors that it names, its inputs, and which configuration of each kernel to take: 0 for the
    first one that Inductor would try, -1 for the last. It returns the outputs, and how many kernels were launched.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # before the process imports anything
            pool.submit(torch.set_num_threads, 1).result()
        yield lambda *args: pool.submit(_run, torch.initial_seed(), *args).result()


def _run(seed: int, code: str, constants: dict[str, Tensor], inputs: list[Any], config: int) -> tuple[list[Any], int]:
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    from bench.offline_triton import pretend_cuda

    torch.manual_seed(seed)  # of which stochastic rounding makes its own
    launches: list[str] = []
    on_cpu = re.sub(r"_empty_strided_cuda\b", "_empty_strided_cpu", code)
    on_cpu = on_cpu.replace("device(type='cuda', index=0)", "device(type='cpu')")
    on_cpu = on_cpu.replace("from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = int")

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def load(_self: Any, name: str, source: str, **_: Any) -> Any:
            return _Kernel(name, source, Path(folder), config, launches)

        for owner, name, value in [
            (AsyncCompile, "triton", load),
            (triton_helpers, "libdevice", _Libdevice()),
            (triton_heuristics, "cached_autotune", _keep),
            (torch.cuda, "_DeviceGuard", lambda _: contextlib.nullcontext()),
            (torch.cuda, "set_device", lambda _: None),
        ]:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(pretend_cuda())
        stack.enter_context(_as_a_gpu_computes())
        namespace = {"__name__": "generated", **constants}
        exec(compile(on_cpu, "generated", "exec"), namespace)
        with np.errstate(all="ignore"):
            outputs = namespace["call"](inputs)
    return list(outputs), len(launches)


def _keep(_size_hints: Any, configs: Any, triton_meta: Any, *_: Any, inductor_meta: Any = None, **__: Any) -> Any:
    """In place of Inductor's autotuning: what it would choose from."""
    return lambda function: SimpleNamespace(function=function, configs=configs, inductor_meta=inductor_meta)


class _Kernel:
    """A kernel of Inductor's, with the one method that the code around it calls."""

    def __init__(self, name: str, source: str, folder: Path, config: int, launches: list[str]) -> None:
        file = folder / f"{name}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kept = getattr(module, name)
        self._function, self._config, self._meta = kept.function, kept.configs[config], kept.inductor_meta
        self._name, self._launches = name, launches

    def run(self, *args: Any, stream: int) -> None:
        from torch._inductor.runtime.triton_heuristics import GridExpr

        self._launches.append(self._name)
        blocks = self._config.kwargs
        given = [name for name in self._function.arg_names if name not in blocks]
        named = dict(zip(given, args, strict=True))
        grid = GridExpr.from_meta(self._meta, self._config).eval_slow({**named, **blocks})
        self._function[grid](**named, **{k: v for k, v in blocks.items() if k in self._function.arg_names})


class _Libdevice:
    """Functions of libdevice by their names, computed by torch."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = {"llrint": lambda x: torch.round(x).to(torch.int64), "rint": torch.round, "nearbyint": torch.round}
        return _elementwise(function.get(name) or getattr(torch, name))


def _elementwise(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A function of torch's tensors as one of Triton's."""

    def call(*args: Any) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        first = next(a for a in args if isinstance(a, tl.tensor))
        arrays = [torch.from_numpy(np.array(a.handle.data)) if isinstance(a, tl.tensor) else a for a in args]
        result = function(*arrays).numpy()
        scalar = tl.int1 if result.dtype == bool else first.dtype
        shape = tl.block_type(scalar, first.shape) if first.type.is_block() else scalar
        return tl.tensor(TensorHandle(result, scalar), shape)

    return call


@contextlib.contextmanager
def _as_a_gpu_computes() -> Iterator[None]:
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.int16).numpy()
            return TensorHandle(rounded.view(np.uint16), tl.bfloat16)
        return cast(self, source, dtype)

    def reduce_halves(self: Any, values: Any) -> Any:
        values, axis = self.unravel(values, self.axis)
        parts = [value.handle.data for value in values]
        while (size := parts[0].shape[axis]) > 1:
            halves = [np.split(part, 2, axis) for part in parts]
            low, high = ([self.to_tensor(h[i], v.dtype) for h, v in zip(halves, values, strict=True)] for i in range(2))
            made = self.combine_fn.fn(*low, *high)
            parts = [np.asarray(m.handle.data) for m in (made if isinstance(made, tuple) else (made,))]
            assert parts[0].shape[axis] == size // 2
        if not self.keep_dims:
            parts = [part.squeeze(axis) for part in parts]
        return [self.to_tensor(part, value.dtype) for part, value in zip(parts, values, strict=True)]

    patch_tensors = triton.runtime.interpreter._patch_lang_tensor

    def patch_indices_too(tensor: Any, scope: Any) -> None:
        patch_tensors(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    with contextlib.ExitStack() as stack:
        for name in ("exp", "exp2", "log", "log2", "sin", "cos", "erf", "rsqrt", "sqrt", "floor", "ceil"):
            function = getattr(torch, name)

            def unary(_self: Any, value: Any, function: Any = function) -> Any:
                return TensorHandle(function(torch.from_numpy(np.array(value.data))).numpy(), value.dtype.scalar)

            stack.enter_context(mock.patch.object(InterpreterBuilder, f"create_{name}", unary))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "cast_impl", cast_impl))
        stack.enter_context(mock.patch.object(triton.runtime.interpreter, "_patch_lang_tensor", patch_indices_too))
        stack.enter_context(mock.patch.object(ReduceOps, "generic_reduce", reduce_halves))
        yield
