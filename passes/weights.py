"""What follows from parameters and buffers alone: weights that autocast casts, or that adapters or a norm make.

It is left exact, or stored without error. Gradients flow through weights, and all elements of a batch read the same, so
that an error of their codes does not average out.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, fx

from fewbit_fx.torch_private.graphs import HigherOrderOperator

from .graph import draws_numbers, placeholders, value_of


def weights(joint: fx.Graph, of_modules: Collection[int]) -> set[fx.Node]:
    """The nodes that are computed from some inputs, sizes and constants alone, and not at random.

    Args:
        joint: A joint graph.
        of_modules: Positions of the inputs that are parameters and buffers of modules.
    """
    given = placeholders(joint)
    found = {given[i] for i in of_modules} | {n for n in given if not isinstance(value_of(n), Tensor)}
    for node in joint.nodes:  # in order
        is_known = node.op == "call_function" and not isinstance(node.target, HigherOrderOperator)
        if is_known and not draws_numbers(node) and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found
