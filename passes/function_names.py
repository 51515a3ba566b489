"""Names of the functions at sites, such as ``gelu`` and ``dropout``."""

from __future__ import annotations

import functools

import torch
from torch import fx

from fewbit_fx.codebooks.activations import is_affine, recognise

from .derivative import Derivative, NotEvaluableError
from .graph import constant_value, is_pointwise

_RANDOM = frozenset({torch.ops.prims.inductor_random.default})


@functools.lru_cache(maxsize=1024)
def activation_name(derivative: Derivative) -> str | None:
    """The activation with this derivative, such as ``gelu``; None if none is known."""
    try:
        return recognise(derivative.evaluated)
    except NotEvaluableError:  # the plan gives the reason
        return None


@functools.lru_cache(maxsize=1024)
def is_product(derivative: Derivative) -> bool:
    """Whether the derivative is a * x + b: that of a product, or of a square."""
    try:
        return is_affine(derivative.evaluated)
    except NotEvaluableError:
        return False


def comes_from_random_numbers(node: fx.Node) -> bool:
    """Whether a mask follows from random numbers alone; ReLU's after a dropout does not."""
    while is_pointwise(node):
        inputs = [n for n in node.all_input_nodes if constant_value(n) is None]
        if len(inputs) != 1:
            return False
        (node,) = inputs
    return _is_random(node)


def _is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.target in _RANDOM or torch.Tag.nondeterministic_seeded in tags
