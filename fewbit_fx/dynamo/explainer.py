"""Explain what fewbit would do to a model, without generating kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from fewbit_fx.config import FewBitConfig
from fewbit_fx.dynamo.listener import Listener
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.reporting.report import Report
from fewbit_fx.torch_private.frames import with_own_code_object
from fewbit_fx.torch_private.inductor import partition_only
from fewbit_fx.torch_private.tensors import kept_by_their_makers


def explain(model: Callable[..., Any], *args: Any, fewbit_config: FewBitConfig | None = None, **kwargs: Any) -> Report:
    """Trace ``model(*args, **kwargs)`` and report what fewbit does to its graphs.

    The model runs forward once in plain ATen, without computing gradients. Its buffers and the random
    state are put back afterwards; what Dynamo has compiled of it stays as it is.

    Args:
        model: A module or function, compiled or not.
        *args: Inputs of the model. One of them, or a parameter, must require gradients.
        fewbit_config: Other options than the default.
        **kwargs: Further inputs of the model.

    Returns:
        The report; it prints as a table and has ``to_dict()``.

    Example:
        >>> import torch, fewbit_fx
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
        >>> model = model.requires_grad_(False)  # what trains is before it
        >>> report = fewbit_fx.explain(model, torch.randn(128, 32, requires_grad=True))
        >>> print(report)  # doctest: +ELLIPSIS
        graph 0/0: recipe default
          where  count  function  shape   dtype    what happened    bytes before  after  rel. error
          1          1  gelu      128x64  float32  coded in 3 bits        32,768  3,088       ...%
        ...
        bytes saved for backward: torch.compile 32,768   fewbit 3,088   (-90.6%)
    """
    listener = Listener()
    config = fewbit_config or FewBitConfig()

    def partition(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        kept = kept_by_their_makers(gm, example_inputs)
        partitioner = FewBitPartitioner(config, listener.record, kept, observe=listener.observe)
        return partition_only(gm, example_inputs, partitioner)

    original = getattr(model, "_orig_mod", model)
    devices = range(torch.cuda.device_count())
    with _unchanged_buffers(original), torch.random.fork_rng(devices), torch.enable_grad():

        def explained(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

        torch.compile(with_own_code_object(explained), backend=partition)(*args, **kwargs)
    return Report(tuple(listener.records))


@contextlib.contextmanager
def _unchanged_buffers(model: Callable[..., Any]) -> Iterator[None]:
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    before = [b.detach().clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
