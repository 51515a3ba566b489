"""Tensor subclasses as users write them.

Each has a ``__repr__``: torch's own would read elements, of which a fake tensor has none. Where a log of torch's trace
is on, as under pytest, torch asks for it while it compiles, and a fault there is a graph break.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing


class Wrapped(Tensor):
    """An activation of a class of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())  # type: ignore

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Wrapped({self.inner})"

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Wrapped:
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bare = pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        result = pytree.tree_map_only(Tensor, Wrapped, function(*bare[0], **bare[1]))
        return return_and_correct_aliasing(function, args, kwargs or {}, result)


class Quantized(Tensor):
    """A frozen weight in 8 bits with a scale per row, decoded where it is read."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Quantized:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)  # type: ignore

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Quantized({self.codes}, {self.scale})"

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Quantized:
        return Quantized(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return Quantized(args[0].codes, args[0].scale)
        bare = pytree.tree_map_only(Quantized, lambda t: t.codes * t.scale, (args, kwargs or {}))
        return function(*bare[0], **bare[1])
