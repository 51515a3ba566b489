"""Inputs that are written to between the forward and the backward, which then would read something else."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, fx

from fewbit_fx.torch_private.graphs import written_arguments
from fewbit_fx.torch_private.sizes import storage_key

from .graph import ancestors, descendants, output_values, placeholders, tangents, value_of


def written_inputs(joint: fx.Graph) -> set[int]:
    """Positions of the inputs that a joint graph itself writes to, and that a gradient depends on.

    Such as a buffer that the forward looks things up in and then updates. The running mean of a batch norm is
    written to as well, but no gradient depends on it.
    """
    written = {storage_key(n) for node in joint.nodes for n in written_arguments(node)}
    if not written:
        return set()
    gradients = descendants(tangents(joint))
    read = ancestors(n for n in output_values(joint) if n in gradients)
    return {i for i, n in enumerate(placeholders(joint)) if n in read and storage_key(n) in written}


def readers(graph: fx.Graph, inputs: Collection[int]) -> Iterator[fx.Node]:
    """What computes something from the inputs at some positions, or from views of them."""
    given = placeholders(graph)
    views = {given[i] for i in inputs}
    storages = {storage_key(n) for n in views}
    for node in graph.nodes:  # in order, so that a view comes before what reads it
        if node not in views and not views.isdisjoint(node.all_input_nodes):
            if isinstance(value_of(node), Tensor) and storage_key(node) in storages:
                views.add(node)
            else:
                yield node
