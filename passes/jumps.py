"""Where a small error of a decoded value would make a large one: comparisons that the backward computes anew.

ReLU behind a norm is 0 or x as the normalised x is below or above 0. If the backward computes that again from a decoded
x, some elements near 0 change sides, and their gradient is wrong by all of itself. A mask is therefore saved, in one
exact bit, where a code stands for what it is computed from. Codes of values keep zeros and signs, so that comparing
such a value itself with 0 is safe; not where they are rounded at random.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from .graph import COPIES, MOVEMENTS, aten, constant_value, descendants, is_boolean, prims, tangents

_STEPS = frozenset(
    {aten.sign.default, aten.sgn.default, aten.floor.default, aten.ceil.default}
    | {aten.round.default, aten.trunc.default, aten.heaviside.default}
)
_COMPARISONS = frozenset(
    {aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.eq.Scalar, aten.ne.Scalar}
)
_KEEP_THE_SIGN = frozenset({aten.relu.default, prims.convert_element_type.default}) | COPIES | MOVEMENTS


def jumps(
    backward: fx.Graph, decoded: Collection[str], at_random: Collection[str] = ()
) -> Mapping[str, frozenset[str]]:
    """The nodes that decide by a decoded value, other than by its sign.

    Args:
        backward: The backward graph of a cut.
        decoded: Names of the saved tensors and masks in whose place a decoded value stands.
        at_random: Those of them that were rounded at random: they have not the zeros of exact ones.

    Returns:
        For each by name, the names of the decoded tensors that it is computed from.
    """
    gradients = descendants(tangents(backward))
    origins: dict[fx.Node, frozenset[str]] = {}
    signs: dict[fx.Node, frozenset[str]] = {}  # of which the node has the sign
    found: dict[str, frozenset[str]] = {}
    for node in backward.nodes:
        own = frozenset({node.name} if node.name in decoded else ())
        origins[node] = own
        signs[node] = own.difference(at_random)
        if own or node in gradients or node.op != "call_function" or constant_value(node) is not None:
            continue
        read = frozenset().union(*(origins[n] for n in node.all_input_nodes))
        sign = frozenset().union(*(signs[n] for n in node.all_input_nodes))
        if node.target in _STEPS or is_boolean(node):
            unsafe = read - sign if _is_of_the_sign(node) else read
            if unsafe:
                found[node.name] = unsafe
        else:
            origins[node] = read
            signs[node] = sign if node.target in _KEEP_THE_SIGN else frozenset()
    return found


def _is_of_the_sign(node: fx.Node) -> bool:
    if node.target in _COMPARISONS:
        threshold = node.args[1]
        return isinstance(threshold, (int, float)) and threshold == 0
    return node.target in (aten.sign.default, aten.sgn.default)
