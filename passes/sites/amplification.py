"""How much a code's error grows in what the backward computes from a saved tensor before a gradient meets it.

A factor such as sigmoid(x) is as wrong as x at most, or not much more. But cos(x) is as wrong as x is in radians: of
the angles of a rotary embedding, up to a thousand, nothing is left. So the program from the saved tensor to the
gradients is run twice, for normally distributed x and for the same with the error of 8-bit codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fewbit_fx.torch_private.modes import real_mode

from ..graph import COPIES, MOVEMENTS, closure, constant_value, is_boolean, is_local, prims, value_of

_BLOCK, _BLOCKS, _LEVELS = 32, 128, 127
_TYPICAL, _LARGE = 1.0, 1024.0  # standard deviations of x
_MOST_UNDEFINED = 0.75  # as of a logarithm, of a normal x half


@dataclass(frozen=True)
class _Made:
    """Stands in a program for the value at this index; 0 is the saved tensor."""

    index: int


@dataclass(frozen=True)
class _Other:
    """Stands in a program for another tensor, by its number, and whether it is boolean."""

    number: int
    is_mask: bool


@dataclass(frozen=True)
class _Constant:
    """Stands in a program for a tensor that this number fills."""

    value: float | bool


@dataclass(frozen=True)
class _Program:
    """Operations, element by element, whose results are appended to the values, and which values gradients meet."""

    steps: tuple[tuple[Callable[..., Any], tuple[Any, ...], tuple[tuple[str, Any], ...]], ...]
    ends: tuple[int, ...]


def amplification(saved: fx.Node, gradients: Set[fx.Node], is_end: Callable[[fx.Node], bool]) -> float:
    """The relative error of what gradients meet, over that of the saved tensor's codes; at least 1.

    For normal x of standard deviation 1 the error is relative to the root mean square of the result. For one of 1024
    it is relative to its largest magnitude: a function may vanish but for a few elements then, as the derivative of
    tanh does, and what is small everywhere else does no harm.

    Args:
        saved: An input of a backward graph.
        gradients: Nodes of that graph that depend on an incoming gradient.
        is_end: Whether a node is not to be followed, but takes its inputs as they are.

    Returns:
        ``inf`` where the program cannot be run.
    """
    try:
        program = _program(saved, gradients, is_end)
        return _measured(program) if program.steps else 1.0
    except Exception:  # an operation may raise whatever it may raise; one of a user's may assert, say, a dtype
        return math.inf


def _program(saved: fx.Node, gradients: Set[fx.Node], is_end: Callable[[fx.Node], bool]) -> _Program:
    values: dict[fx.Node, Any] = {saved: _Made(0)}
    others: dict[fx.Node, _Other] = {}
    steps: list[Any] = []
    ends: dict[int, None] = {}

    def value(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        constant = constant_value(node)
        if constant is not None:
            return _Constant(bool(constant) if is_boolean(node) else float(constant))
        return others.setdefault(node, _Other(len(others), is_boolean(node)))

    for node in _followed(saved, gradients, is_end):
        inputs = [n for n in node.all_input_nodes if n in values]
        if node is not saved:
            if _passes_on(node):
                values[node] = values[inputs[0]]
            else:
                args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
                steps.append((node.target, _hashable(args), tuple(sorted(kwargs.items()))))
                values[node] = _Made(len(steps))
        if any(user in gradients or is_end(user) or not is_local(user) for user in node.users):
            ends[values[node].index] = None
    return _Program(tuple(steps), tuple(ends))


def _followed(saved: fx.Node, gradients: Set[fx.Node], is_end: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The saved tensor, and all that is computed from it alone or with other tensors of the forward, in order."""

    def read_by(node: fx.Node) -> Iterator[fx.Node]:
        return (user for user in node.users if user not in gradients and is_local(user) and not is_end(user))

    return sorted(closure([saved], read_by))


def _passes_on(node: fx.Node) -> bool:
    """Whether a value goes on as it is, elsewhere or in another precision."""
    if node.target is prims.convert_element_type.default:
        return bool(value_of(node).dtype.is_floating_point and not is_boolean(node.all_input_nodes[0]))
    return node.target in COPIES or node.target in MOVEMENTS


def _hashable(args: Any) -> Any:
    return tuple(map(_hashable, args)) if isinstance(args, (list, tuple)) else args


@functools.lru_cache(maxsize=1024)
def _measured(program: _Program) -> float:
    with real_mode(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_BLOCKS, _BLOCK, dtype=torch.float64, generator=generator)
        return max(1.0, _grown(program, x * _TYPICAL, _root_mean_square), _grown(program, x * _LARGE, _largest))


def _grown(program: _Program, x: Tensor, size: Callable[[Tensor], Tensor]) -> float:
    """The largest of all results' errors, over that of x."""
    coded = _coded(x)
    error = _root_mean_square(coded - x) / _root_mean_square(x)
    pairs = zip(_run(program, x), _run(program, coded), strict=True)
    return float(max(_error(one, other, size) for one, other in pairs) / error)


def _coded(x: Tensor) -> Tensor:
    """As evenly coded blocks are decoded: the middle of an interval, on the same side of 0."""
    step = x.abs().amax(-1, keepdim=True) / _LEVELS
    return ((x / step).floor() + 0.5) * step


def _run(program: _Program, x: Tensor) -> list[Tensor]:
    values: list[Any] = [x]

    def found(argument: Any) -> Any:
        if isinstance(argument, _Made):
            return values[argument.index]
        if isinstance(argument, _Constant):
            return torch.tensor(argument.value, dtype=torch.bool if isinstance(argument.value, bool) else torch.float64)
        if isinstance(argument, _Other):
            generator = torch.Generator().manual_seed(1 + argument.number)
            sample = torch.randn(x.shape, dtype=torch.float64, generator=generator)
            return sample > 0 if argument.is_mask else sample
        return [found(each) for each in argument] if isinstance(argument, tuple) else argument

    for target, args, kwargs in program.steps:
        values.append(target(*(found(a) for a in args), **{name: found(a) for name, a in kwargs}))
    return [values[i].double().broadcast_to(x.shape) for i in program.ends]


def _error(exact: Tensor, coded: Tensor, size: Callable[[Tensor], Tensor]) -> Tensor:
    defined = ~exact.isnan()
    if defined.double().mean() < 1 - _MOST_UNDEFINED:
        return torch.tensor(math.inf)
    difference = torch.where(exact == coded, 0.0, coded - exact)[defined]  # infinities may be equal
    if not difference.any():
        return torch.tensor(0.0)
    return torch.nan_to_num(_root_mean_square(difference) / size(exact[defined]), nan=math.inf)


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _largest(x: Tensor) -> Tensor:
    return x.abs().max()
