"""Bytes, storages and symbolic sizes of the values in a graph."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._functorch.partitioners import _size_of
from torch._higher_order_ops import invoke_subgraph  # the call of a region that is compiled once for many places
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
    "sizes_of",
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
    """A key of the storage of a node's value: equal for two nodes exactly if they are views of one storage.

    All calls of a region under ``torch.compiler.nested_compile_region`` have the same fake results, so what a call
    makes counts by the call.
    """
    storage = _storage(node)
    if storage is None:
        return node
    for source in node.all_input_nodes:
        if source.target is invoke_subgraph and node.target is operator.getitem:
            given = _passed_on(source, cast(int, node.args[1]))
            return (storage, source.name) if given is None else storage_key(given)
        if _storage(source) == storage:
            return storage_key(source)
    return storage


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, FakeTensor) else None  # a fake one has no data_ptr


def _passed_on(call: fx.Node, index: int) -> fx.Node | None:
    """The argument of which a result of a region's call is a view, if it is of one."""
    module, (region, _, *given) = call.graph.owning_module, call.args
    assert module is not None
    assert isinstance(region, fx.Node)
    graph = getattr(module, str(region.target)).graph
    (results,) = graph.output_node().args
    made = storage_key(results[index])
    for argument, within in zip(given, graph.find_nodes(op="placeholder"), strict=True):
        if storage_key(within) == made:
            return cast(fx.Node, argument)
    return None


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


def sizes_of(x: Tensor) -> list[int]:
    """The sizes of a tensor, those as numbers that were symbols once: no trace tracks what has become a number."""
    sizes: list[Any] = []
    shape: tuple[Any, ...] = x.shape
    for size in shape:
        number = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
        sizes.append(size if number is None else number)
    return sizes


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
