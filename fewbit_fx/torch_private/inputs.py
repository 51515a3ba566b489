"""The inputs of a graph that live on whatever it saves: parameters, buffers, and what other graphs keep."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

# Where AOTAutograd says of each input of its graphs what it was before.
from torch._functorch._aot_autograd.descriptors import BufferAOTInput, ParamAOTInput, PlainAOTInput
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_DESCRIPTION = "desc"  # key of a placeholder's metadata
_OUTER = ("base", "base_of")  # of a description: that of the wrapper of which an input is a part, or of its view


@dataclass(frozen=True)
class LivingInputs:
    """The inputs of a graph that live on whatever it saves.

    Attributes:
        kept: Positions of parameters, of other leaves of which a gradient is asked, and of what another graph keeps,
            whose backward would raise if it were written to.
        buffers: Positions of buffers. They may well be written to between forward and backward, as the codebook of a
            vector quantiser is.
        parameters: Those of ``kept`` that are parameters of a module, so far as that is known.
    """

    kept: tuple[int, ...] = ()
    buffers: tuple[int, ...] = ()
    parameters: tuple[int, ...] = ()

    @property
    def positions(self) -> tuple[int, ...]:
        """All of them, ascending."""
        return tuple(sorted({*self.kept, *self.buffers}))

    @property
    def of_modules(self) -> tuple[int, ...]:
        """Parameters and buffers, ascending: no batch has a part in them."""
        return tuple(sorted({*self.parameters, *self.buffers}))


def living_inputs(joint: fx.Graph, static: Collection[int], known: LivingInputs) -> LivingInputs:
    """The inputs of a joint graph that live on whatever the graph saves.

    Args:
        joint: The joint graph.
        static: Positions of parameters and buffers, as AOTAutograd has them. Behind a DTensor they are not right: it
            counts its local tensor, and the mesh, which is an input as well, not (torch 2.13).
        known: What :func:`kept_by_their_makers` has found. Dynamo's graph has neither the parts of a tensor such as
            DTensor as inputs, nor what AOTAutograd puts before them.
    """
    inputs = joint.find_nodes(op="placeholder")
    lasting, buffers, parameters = set(), set(), set()
    for i, node in enumerate(inputs):
        origin = _origin(node.meta.get(_DESCRIPTION))
        position = origin.idx if isinstance(origin, PlainAOTInput) else None
        if isinstance(origin, ParamAOTInput) or position in known.parameters:
            parameters.add(i)
        elif position in known.kept:
            lasting.add(i)
        elif isinstance(origin, BufferAOTInput) or position in known.buffers:
            buffers.add(i)
    lasting |= parameters
    if not any(hasattr(node.meta.get(_DESCRIPTION), "base") for node in inputs):
        lasting |= set(static) - buffers
    return LivingInputs(*(tuple(sorted(found)) for found in (lasting, buffers, parameters)))


def are_described(joint: fx.Graph) -> bool:
    """Whether AOTAutograd says of a joint graph's inputs what they were before.

    It does not of those of a region under ``torch.compiler.nested_compile_region``, which is partitioned by itself,
    once for all places: neither which are parameters, nor what the graph around it keeps.
    """
    inputs = joint.find_nodes(op="placeholder")
    return not inputs or any(node.meta.get(_DESCRIPTION) is not None for node in inputs)


def _origin(description: Any) -> Any:
    """The input of Dynamo's graph that an input of AOTAutograd's is, or is a part or the base of."""
    for outer in _OUTER:
        if hasattr(description, outer):
            return _origin(getattr(description, outer))
    return description


def kept_by_their_makers(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> LivingInputs:
    """The inputs of Dynamo's graph whose storage lives on whatever the graph saves.

    A parameter or buffer is kept by its module, and another leaf by what accumulates its gradient. Behind a graph
    break the inputs of a graph are the outputs of another, which may have saved them. Hooks on saved tensors are not
    run: they may compute a whole checkpoint again.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs; fake ones where DistributedDataParallel has a graph cut into buckets.
    """
    static, kept, buffers, parameters = _static_inputs(gm), [], [], []
    for i, x in enumerate(example_inputs):
        if not isinstance(x, Tensor):
            continue
        if i in static and not isinstance(x, nn.Parameter):
            buffers.append(i)
        elif i in static or _is_kept_by_its_maker(x):
            kept.append(i)
            if i in static:
                parameters.append(i)
    return LivingInputs(tuple(kept), tuple(buffers), tuple(parameters))


def _static_inputs(gm: fx.GraphModule) -> set[int]:
    """Positions of what Dynamo has marked as a parameter or a buffer of a module."""
    inputs = gm.graph.find_nodes(op="placeholder")
    return {i for i, n in enumerate(inputs) if n.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")}


def _is_kept_by_its_maker(x: Tensor) -> bool:
    if x.is_leaf:
        return x.requires_grad
    wanted = set(_storages(x))
    found: set[int] = set()
    todo, seen = [x.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kept = list(_unhooked_saved_tensors(node))
        found.update(storage for t in kept for storage in _storages(t))
        if not kept:  # it may have passed on what it was given, as a view does, or the hooks of a sharded module
            todo += [before for before, _ in node.next_functions]
    return bool(wanted) and wanted <= found


def _storages(x: Tensor) -> Iterator[int]:
    """Keys of the storages of a tensor, or of the parts of one such as DTensor."""
    wrapper: Any = x  # no type of torch's is both
    if is_traceable_wrapper_subclass(wrapper):
        names, _ = wrapper.__tensor_flatten__()
        for part in (getattr(wrapper, name) for name in names):
            if isinstance(part, Tensor):
                yield from _storages(part)
    elif x.layout == torch.strided:
        yield x.untyped_storage()._cdata  # fake tensors, and sharded parameters while they are freed, have no data_ptr


def _unhooked_saved_tensors(node: Any) -> Iterator[Tensor]:
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            saved = getattr(node, name)
            for raw in saved if isinstance(saved, (tuple, list)) else (saved,):
                if raw.unpack_hook is None and isinstance(raw.data, Tensor):
                    yield raw.data
