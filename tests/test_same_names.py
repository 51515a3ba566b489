"""Nodes that the forward lacks: whether it can compute them is found in time that grows with the graph alone."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from helpers import watch
from torch import Tensor, nn


class Late(torch.autograd.Function):
    """Its backward multiplies with a derivative at the end of a long chain, each of whose steps has two paths."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, steps: int) -> Tensor:
        ctx.steps = steps
        ctx.save_for_backward(x, y)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        for _ in range(ctx.steps):
            x = (x + y) * x.abs()
        s = torch.sigmoid(x)
        return gradient * (s * (1 - s)), None, None


@pytest.mark.parametrize("steps", [40, pytest.param(sys.getrecursionlimit(), marks=pytest.mark.slow)])
def test_a_long_chain_that_the_backward_alone_computes(steps: int) -> None:
    model, other, x = nn.Linear(32, 64), nn.Linear(32, 64), torch.randn(64, 32)
    seen = watch(lambda x: Late.apply(model(x), other(x), steps), x)
    assert len(seen.plain.computed_in_backward()) > steps
    (site,) = seen.coded
    assert site.function == "sigmoid"
    seen.output.sum().backward()
    assert model.weight.grad is not None
