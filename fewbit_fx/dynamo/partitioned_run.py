"""Run a model as fewbit partitions it, in plain ATen: no kernels, and no trace of it afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from fewbit_fx.config import FewBitConfig
from fewbit_fx.dynamo.listener import Listener
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.torch_private.frames import with_own_code_object
from fewbit_fx.torch_private.inductor import partition_only
from fewbit_fx.torch_private.inputs import kept_by_their_makers


def partitioned(model: Callable[..., Any], config: FewBitConfig, listener: Listener) -> Callable[..., Any]:
    """The model, to be called: its graphs are partitioned at the first call.

    Args:
        model: A module or function, compiled or not. What Dynamo has compiled of it stays as it is.
        config: The options.
        listener: Told of each graph.
    """

    def partition(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        kept = kept_by_their_makers(gm, example_inputs)
        partitioner = FewBitPartitioner(config, listener.record, kept, observe=listener.observe)
        return partition_only(gm, example_inputs, partitioner)

    original = original_of(model)

    def run(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    compiled: Callable[..., Any] = torch.compile(with_own_code_object(run), backend=partition)
    return compiled


def original_of(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model itself, where torch.compile has wrapped it."""
    original: Callable[..., Any] = getattr(model, "_orig_mod", model)
    return original


@contextlib.contextmanager
def undisturbed(model: Callable[..., Any]) -> Iterator[None]:
    """Put back the model's buffers and the random state afterwards."""
    original = original_of(model)
    buffers = list(original.buffers()) if isinstance(original, nn.Module) else []
    before = [b.detach().clone() for b in buffers]
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
