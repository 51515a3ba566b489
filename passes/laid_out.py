"""How tensors will lie in memory where that is not as the graph states: with channels last, around convolutions.

Inductor gives a convolution its input, and takes its output, with channels last, and what is computed from that element
by element stays so. A code of a tensor in another order would be made and read with a stride for each element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fewbit_fx.torch_private.inductor import lays_channels_last
from fewbit_fx.torch_private.modes import mode_of

from .graph import aten, descendants, placeholders, tangents, value_of

_KEY = "fewbit_laid_out"
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def laid_out(node: fx.Node) -> Any:
    """The fake value of a node; a tensor with the strides that it is expected to have."""
    return node.meta.get(_KEY, value_of(node))


def note_layouts(joint: fx.Graph, forward: fx.GraphModule) -> None:
    """Note on the nodes of a joint graph how the tensors of the forward will lie.

    What it decides is how fast codes are: where an operation fails, tensors lie as the graph states.

    Args:
        joint: The joint graph.
        forward: The forward that was cut from it, which Inductor will compile.
    """
    inputs = [value_of(n) for n in placeholders(forward.graph)]
    tensors = [i for i in inputs if isinstance(i, Tensor)]
    if len(tensors) < len(inputs) or not tensors or not lays_channels_last(forward):
        return  # sizes that are symbols are inputs too
    with mode_of(tensors[0]), torch.no_grad():
        gradients = descendants(tangents(joint))
        for node in joint.nodes:
            if node.op == "call_function" and node not in gradients and isinstance(value_of(node), Tensor):
                _note(node)


def _note(node: fx.Node) -> None:
    is_convolution = node.target is aten.convolution.default
    if not is_convolution and not any(_KEY in n.meta for n in node.all_input_nodes):
        return
    target: Any = aten.reshape.default if node.target is aten.view.default else node.target
    args: Any
    args, kwargs = map_arg((node.args, node.kwargs), laid_out)
    if is_convolution:
        args = (_channels_last(args[0]), *args[1:])
    try:
        value = target(*args, **kwargs)
    except Exception:  # an operation may raise whatever it may raise, where its input lies otherwise
        return
    value = _channels_last(value) if is_convolution else value
    if value.stride() != value_of(node).stride():
        node.meta[_KEY] = value


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_FORMATS[x.dim()]) if x.dim() in _FORMATS else x
