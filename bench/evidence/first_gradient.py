"""The error of a method's first gradient, by its codes alone.

Graphs are partitioned, but run by plain ATen operations: there what is computed again is the same bit for bit, and the
rounding of a dtype, which differs from kernel to kernel, is the same for all methods.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import fewbit_fx
from bench.architectures import Example
from bench.evidence.methods import METHODS, REFERENCE, Method
from bench.measure import flat_gradient, relative_error
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.torch_private.inductor import partition_only


class FirstGradient:
    """That of a model, by any method.

    Args:
        build: Makes the model, each time with the same weights, and with no gradients.
        seed: Of dropout.
    """

    def __init__(self, build: Callable[[], Example], seed: int) -> None:
        self._build, self._seed = build, seed
        self._exact: dict[str, Tensor] = {}

    def of(self, method: Method) -> float | None:
        """Relative error over all parameters, or None where a method is exact by construction."""
        if method.is_exact:
            return None
        like = REFERENCE if method.compiled else "eager"  # what draws the same random numbers
        if like not in self._exact:
            self._exact[like] = self._of(METHODS[like])
        return relative_error(self._of(method), self._exact[like])

    def _of(self, method: Method) -> Tensor:
        found = _gradient(self._build(), method, self._seed)
        torch.compiler.reset()
        gc.collect()  # a graph that has run holds what it has saved
        return found


def _gradient(example: Example, method: Method, seed: int) -> Tensor:
    torch.manual_seed(seed)
    model = _partitioned(example.model, method) if method.compiled else method.applied(example.model)
    example.loss(model(**example.inputs)).backward()
    gradient = flat_gradient(example.model)
    example.model.zero_grad()  # its parameters may be those of another
    return gradient


def _partitioned(model: nn.Module, method: Method) -> Callable[..., Any]:
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with method.settings():
            return partition_only(gm, example_inputs, _partitioner(method), method.inductor)

    torch.compiler.reset()
    return torch.compile(model, backend=backend, dynamic=False)


def _partitioner(method: Method) -> FewBitPartitioner | None:
    if method.options is None:
        return None
    return FewBitPartitioner(fewbit_fx.FewBitConfig(**method.options), lambda record: None)
