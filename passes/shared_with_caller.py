"""Saved tensors that the caller has too, results and inputs: it may write to them before the backward.

Where torch.compile's own cut saves such a tensor, it forbids to write to it, as eager PyTorch does; where that is not
seen, as of a view among the results or of `.data`, it goes wrong without a word. A leaner cut may save a result or an
input in place of what torch.compile computes from it: it would then forbid more. So it saves a copy.

What another graph keeps needs none, for its backward would raise. Buffers and large parameters, such as tables of
embeddings, are better not read at all: their copies would be more bytes than what is computed from them. Without the
small ones, such as biases, little could be computed again.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, fx

from fewbit_fx.torch_private.inputs import LivingInputs
from fewbit_fx.torch_private.sizes import storage_key, storage_nbytes

from .graph import output_values, placeholders, value_of
from .partition import Partition
from .splice import after, description, splice, trace

_SMALL = 2**16  # bytes: the biases of models of any width, and no table


def inputs_not_to_read(plain: Partition, living: LivingInputs) -> list[int]:
    """Positions of inputs that a leaner cut is not to save, for it could or should save no copy of them.

    Args:
        plain: torch.compile's own cut: what it saves may be saved.
        living: The inputs that live anyway.
    """
    saved = {*plain.saved_inputs(), *living.guarded}
    large = {i for i, n in _tensors(plain) if storage_nbytes(n) > _SMALL}
    kept_out = {*living.buffers, *large.intersection(living.leaves)}
    return [i for i, n in _tensors(plain) if i not in saved and (i in kept_out or not _is_copied_as_it_is(n))]


def with_copies_counted(cut: Partition, plain: Partition, living: LivingInputs) -> Partition:
    """A leaner cut that knows of the parameters of which it will save copies."""
    copied = _newly_saved_inputs(cut, plain, living).intersection(living.leaves)
    return replace(cut, copied_leaves=tuple(sorted(copied)))


def can_be_kept_apart(cut: Partition, plain: Partition, living: LivingInputs) -> bool:
    """Whether copies, where the cut needs them, have the bytes and strides of the originals.

    Args:
        cut: A leaner cut.
        plain: torch.compile's own.
        living: The inputs that live anyway.
    """
    shared = _shared(cut, plain, living)
    one_each = len({storage_key(n) for n in shared}) == len(shared)
    has_buffers = not set(living.buffers).isdisjoint(_newly_saved_inputs(cut, plain, living))
    return one_each and not has_buffers and all(_is_copied_as_it_is(n) for n in shared)


def keep_apart(chosen: Partition, plain: Partition, living: LivingInputs) -> None:
    """Let a partition save copies of what the caller has too and torch.compile's own cut does not save."""
    for node in _shared(chosen, plain, living):
        (copy,) = splice(_copying(node), [node], after(node), node)
        output = node.graph.output_node()
        results, saved = _split(chosen)
        output.args = ((*results, *(copy if n is node else n for n in saved)),)
    chosen.forward.recompile()


def _shared(cut: Partition, plain: Partition, living: LivingInputs) -> list[fx.Node]:
    """Saved tensors that the caller has too, where those of torch.compile's own cut are none."""
    inputs = placeholders(cut.forward.graph)
    found = cut.saved_results() - plain.saved_results()
    found |= {storage_key(inputs[i]) for i in _newly_saved_inputs(cut, plain, living)}
    return list(dict.fromkeys(n for n in cut.saved() if storage_key(n) in found))


def _newly_saved_inputs(cut: Partition, plain: Partition, living: LivingInputs) -> set[int]:
    return set(cut.saved_inputs()) - set(plain.saved_inputs()) - set(living.guarded)


def _tensors(cut: Partition) -> list[tuple[int, fx.Node]]:
    """The inputs that are tensors, with their positions."""
    return [(i, n) for i, n in enumerate(placeholders(cut.forward.graph)) if isinstance(value_of(n), Tensor)]


def _split(cut: Partition) -> tuple[list[fx.Node], list[fx.Node]]:
    values = list(output_values(cut.forward.graph))
    return values[: cut.num_fwd_outputs], values[cut.num_fwd_outputs :]


def _is_copied_as_it_is(node: fx.Node) -> bool:
    traced = _copying(node)
    (copy,) = output_values(traced)
    return description(copy) == description(node)


def _copying(node: fx.Node) -> fx.Graph:
    return trace(lambda x: [x.clone()], [node])
