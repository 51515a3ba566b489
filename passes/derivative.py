"""A derivative read off a graph: a straight-line program from x to f'(x)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fewbit_fx.codebooks.fitting import Array
from fewbit_fx.torch_private.modes import real_mode

from .graph import COPIES, constant_value, prims, value_of
from .reasons import Cause, Reason

_X, _GRADIENT = 0, 1  # where the program finds its inputs


class NotEvaluableError(Exception):
    """A derivative that cannot be read off its region or evaluated.

    Attributes:
        reason: Why.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Value:
    """Stands in a program for the value at this index."""

    index: int


@dataclass(frozen=True)
class Instruction:
    """One operation; its result is appended to the values."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def converts_to(self) -> torch.dtype | None:
        """The target of a conversion between dtypes."""
        return self.args[1] if self.target is prims.convert_element_type.default else None


@dataclass(frozen=True)
class Derivative:
    """The factor by which a region of a graph multiplies the gradient, as a function of x alone.

    Equal programs are equal derivatives, whatever graph or layer they were read from.
    """

    instructions: tuple[Instruction, ...]
    gradient_dtype: torch.dtype

    @classmethod
    def of_region(cls, source: fx.Node, entry: fx.Node, nodes: Iterable[fx.Node]) -> Derivative:
        """Read the program off ``nodes`` (in graph order, the last one is the exit).

        Raises:
            NotEvaluableError: A node needs a value other than ``source``, ``entry`` and numbers.
        """
        index = {source: Value(_X), entry: Value(_GRADIENT)}
        program = []
        for node in nodes:
            program.append(_instruction(node, index))
            index[node] = Value(_GRADIENT + len(program))
        return cls(tuple(program), value_of(entry).dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """f'(x), computed by the graph's own operations in the graph's own dtypes."""
        values: list[Any] = [x, torch.ones((), dtype=self.gradient_dtype, device=x.device)]
        for step in self.instructions:
            args, kwargs = _resolve(step, values)
            if step.target is torch.full:
                kwargs["device"] = x.device
            values.append(step.target(*args, **kwargs))
        result: Tensor = values[-1]
        return result.expand(x.shape)

    def evaluated(self, x: Array) -> Array:
        """f'(x) in float64, by :meth:`ideal`.

        Raises:
            NotEvaluableError: An operation raised whatever it may raise; one of a user's may assert, say, a dtype.
        """
        try:
            return self.ideal(x)
        except Exception as fault:
            problem = str(fault) or type(fault).__name__
            raise NotEvaluableError(Reason.of(Cause.NOT_EVALUABLE, problem=problem)) from fault

    def ideal(self, x: Array) -> Array:
        """f'(x) in float64 throughout: what the graph means, free of its dtypes' rounding."""
        with real_mode(), torch.no_grad():
            values: list[Any] = [torch.from_numpy(x).double(), torch.ones((), dtype=torch.float64)]
            for step in self.instructions:
                args, kwargs = _resolve(step, values)
                if step.converts_to is not None:
                    exact = torch.float64 if step.converts_to.is_floating_point else step.converts_to
                    values.append(args[0].to(exact))
                    continue
                if step.target is torch.full and kwargs["dtype"].is_floating_point:
                    kwargs["dtype"] = torch.float64
                values.append(step.target(*args, **kwargs))
            return values[-1].double().expand(x.shape).numpy()  # type: ignore[no-any-return]


def _instruction(node: fx.Node, index: Mapping[fx.Node, Value]) -> Instruction:
    constant = constant_value(node)
    if constant is not None:
        return Instruction(torch.full, ((), constant), (("dtype", value_of(node).dtype),))

    def to_value(argument: fx.Node) -> Any:
        if argument not in index:
            raise NotEvaluableError(Reason.of(Cause.UNKNOWN_INPUT, node=argument.name))
        return index[argument]

    if node.target in COPIES:
        return Instruction(_identity, (to_value(node.all_input_nodes[0]),))
    assert callable(node.target)
    args = map_arg(node.args, to_value)
    kwargs = map_arg(node.kwargs, to_value)
    return Instruction(node.target, tuple(args), tuple(sorted(kwargs.items())))


def _identity(value: Tensor) -> Tensor:
    return value


def _resolve(step: Instruction, values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    def look_up(argument: Any) -> Any:
        return values[argument.index] if isinstance(argument, Value) else argument

    return [look_up(a) for a in step.args], {k: look_up(v) for k, v in step.kwargs}
