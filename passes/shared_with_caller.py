"""Results of a graph that the backward reads: the caller has them too, and may write to them before the backward.

Where torch.compile's own cut saves such a result, it forbids to write to it, as eager PyTorch does; where the result is
a view, it goes wrong without a word. A leaner cut may save a result in place of what torch.compile computes from it: it
would then forbid more. So it saves a copy.
"""

from __future__ import annotations

from torch import fx

from fewbit_fx.torch_private.sizes import storage_key

from .graph import output_values
from .partition import Partition
from .splice import after, description, splice, trace


def can_be_kept_apart(cut: Partition, plain: Partition) -> bool:
    """Whether copies of results, where the cut needs them, have the bytes and strides of the originals.

    Args:
        cut: A leaner cut.
        plain: torch.compile's own.
    """
    shared = _shared(cut, plain)
    one_each = len({storage_key(n) for n in shared}) == len(shared)
    return one_each and all(_is_copied_as_it_is(n) for n in shared)


def keep_apart(chosen: Partition, plain: Partition) -> None:
    """Let a partition save copies of the results that torch.compile's own cut does not save."""
    for node in _shared(chosen, plain):
        (copy,) = splice(_copying(node), [node], after(node), node)
        output = node.graph.output_node()
        results, saved = _split(chosen)
        output.args = ((*results, *(copy if n is node else n for n in saved)),)
    chosen.forward.recompile()


def _shared(cut: Partition, plain: Partition) -> list[fx.Node]:
    """Saved tensors that the caller has too, where those of torch.compile's own cut are none."""
    found = cut.saved_results() - plain.saved_results()
    return list(dict.fromkeys(n for n in cut.saved() if storage_key(n) in found))


def _split(cut: Partition) -> tuple[list[fx.Node], list[fx.Node]]:
    values = list(output_values(cut.forward.graph))
    return values[: cut.num_fwd_outputs], values[cut.num_fwd_outputs :]


def _is_copied_as_it_is(node: fx.Node) -> bool:
    traced = _copying(node)
    (copy,) = output_values(traced)
    return description(copy) == description(node)


def _copying(node: fx.Node) -> fx.Graph:
    return trace(lambda x: [x.clone()], [node])
