"""Graphs compiled by Inductor up to its kernels, and run in plain ATen: all before is its own, also the partition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._inductor import compile_fx


@contextmanager
def no_kernels() -> Iterator[None]:
    """Plain ATen in place of generated kernels, whoever asks Inductor for them and with what compiler of graphs."""
    whole = compile_fx.compile_fx

    def run_eagerly(graph: fx.GraphModule, _inputs: object, **_kwargs: object) -> Any:
        return make_boxed_func(graph.forward)

    def compile_plainly(gm: fx.GraphModule, inputs: Any, inner_compile: object = None, **kwargs: Any) -> Any:
        compiled: Callable[..., Any] = whole(gm, inputs, run_eagerly, **kwargs)
        return compiled

    caches_off = torch._functorch.config.patch(enable_autograd_cache=False)  # its entries need kernels
    with mock.patch.object(compile_fx, "compile_fx", compile_plainly), caches_off:
        yield
