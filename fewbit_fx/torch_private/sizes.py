"""Bytes, storages and symbolic sizes of the values in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.partitioners import _size_of
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import py_sym_types
from torch.fx.experimental.symbolic_shapes import (
    free_symbols,
    free_unbacked_symbols,
    is_nested_int,
    statically_known_true,  # reads, never adds a guard
)

__all__ = [
    "bare_symbol",
    "has_known_size",
    "has_size_from_data",
    "hint",
    "is_symbol",
    "nbytes",
    "size_symbols",
    "statically_known_true",
    "storage_key",
    "storage_nbytes",
]


def nbytes(node: fx.Node) -> int:
    """Bytes of a node's value by the partitioner's own count, with hints for symbolic sizes."""
    return int(_size_of(node))


def has_known_size(node: fx.Node) -> bool:
    """Whether the partitioner can count the bytes of a node's value, which it cannot of all without a fake one."""
    if "val" in node.meta:
        return True
    try:
        _size_of(node)
    except RuntimeError:
        return False
    return True


def storage_key(node: fx.Node) -> object:
    """A key of the storage of a node's value: equal for two nodes exactly if they are views of one storage."""
    value = node.meta.get("val")
    if isinstance(value, FakeTensor):
        return value.untyped_storage()._cdata  # fake storages have no data_ptr to compare
    return node


def storage_nbytes(node: fx.Node) -> int:
    """Bytes of the whole storage of a node's value: a view keeps all of it alive, and an expanded one no more."""
    value = node.meta.get("val")
    if isinstance(value, FakeTensor):
        return hint(value.untyped_storage().nbytes())
    return nbytes(node)


def has_size_from_data(value: Tensor) -> bool:
    """Whether a size or stride follows from data, as that of ``x[mask]`` and of jagged dimensions does.

    Such a symbol has no value when compiling, and a trace of new operations on it cannot bind it.
    """
    return any(map(is_nested_int, value.shape)) or bool(free_unbacked_symbols(value))


def size_symbols(value: Tensor) -> frozenset[object]:
    """The symbols in the sizes and strides of a tensor."""
    return frozenset(free_symbols(value))


def bare_symbol(value: Any) -> object | None:
    """The symbol that a symbolic number is; None for an expression, from which its symbols may not follow."""
    expression = value.node.expr if isinstance(value, torch.SymInt) and value.node.is_symbolic() else None
    return expression if expression is not None and expression.is_Symbol else None


def is_symbol(node: fx.Node) -> bool:
    """Whether a node's value is a symbolic size or number, not a tensor."""
    return isinstance(node.meta.get("val"), py_sym_types)


def hint(size: int | torch.SymInt) -> int:
    """The size itself, or the size at which a symbolic one was first seen."""
    if isinstance(size, int):
        return size
    found = size.node.hint
    return int(found) if found is not None else 4096  # the partitioner's own fallback
