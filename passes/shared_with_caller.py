"""Saved tensors that the caller has too, results and inputs: it may write to them before the backward.

Where torch.compile's own cut saves such a tensor, it forbids to write to it, as eager PyTorch does; where that is not
seen, as of a view among the results or of `.data`, it goes wrong without a word. A leaner cut may save a result or an
input in place of what torch.compile computes from it: it would then forbid more. So it saves a copy.

Parameters are not copied, or a leaner cut could compute nothing again that has a bias: they are written to by an
optimizer, behind the backward. Nor is what another graph keeps, whose backward would raise. Buffers are better not
read at all: their copy would be more bytes.
"""

from __future__ import annotations

from torch import Tensor, fx

from fewbit_fx.torch_private.inputs import LivingInputs
from fewbit_fx.torch_private.sizes import storage_key

from .graph import output_values, placeholders, value_of
from .partition import Partition
from .splice import after, description, splice, trace


def inputs_not_to_read(plain: Partition, living: LivingInputs) -> list[int]:
    """Positions of inputs that a leaner cut is not to save, for it could save no copy of them.

    Args:
        plain: torch.compile's own cut: what it saves may be saved.
        living: The inputs that live anyway.
    """
    saved = {*plain.saved_inputs(), *living.kept}
    inputs = [(i, n) for i, n in enumerate(placeholders(plain.forward.graph)) if isinstance(value_of(n), Tensor)]
    return [i for i, n in inputs if i not in saved and (i in living.buffers or not _is_copied_as_it_is(n))]


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
    return set(cut.saved_inputs()) - set(plain.saved_inputs()) - set(living.kept)


def _split(cut: Partition) -> tuple[list[fx.Node], list[fx.Node]]:
    values = list(output_values(cut.forward.graph))
    return values[: cut.num_fwd_outputs], values[cut.num_fwd_outputs :]


def _is_copied_as_it_is(node: fx.Node) -> bool:
    traced = _copying(node)
    (copy,) = output_values(traced)
    return description(copy) == description(node)


def _copying(node: fx.Node) -> fx.Graph:
    return trace(lambda x: [x.clone()], [node])
