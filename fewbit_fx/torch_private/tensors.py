"""Kinds of tensors, and which operation keeps a tensor alive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is a strided one: not nested, sparse or MKL-DNN's, nor a wrapper of others such as DTensor.

    ``is_traceable_wrapper_subclass`` of ``torch.utils._python_dispatch`` asks the tensor; traced by Dynamo, only
    its class has the answer.
    """
    return x.layout == torch.strided and not x.is_nested and not hasattr(type(x), "__tensor_flatten__")


def version(x: Tensor) -> int:
    """The number of times that a tensor was written to."""
    return x._version


def kept_by_their_makers(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[int, ...]:
    """Positions of a graph's inputs whose storage is kept for its own backward by the operation that made them.

    A leaf, such as a parameter that is an argument, is kept by what accumulates its gradient. Behind a graph break the
    inputs of a graph are the outputs of another, which may have saved them. Hooks on saved tensors are not run: they
    may compute a whole checkpoint again. Where AOTAutograd will number the inputs in another way, none are named.

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
    if x.is_leaf:
        return x.requires_grad
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
