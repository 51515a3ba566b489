"""The backends that benchmarks compare: inductor as it comes, inductor with its own leaner cut, and fewbit.

The leaner cut is torch's own way to trade time for memory: with a budget of activation memory below 1 it computes
cheap operations again. A comparison with the default alone would credit fewbit with what a setting of torch does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx, nn

import fewbit_fx
from fewbit_fx.torch_private.dynamo import lookup_backend
from fewbit_fx.torch_private.inductor import activation_memory_budget

BUDGET = 0.9
INDUCTOR, BUDGETED, FEWBIT = "inductor", f"budget_{BUDGET}", "fewbit"
BACKENDS = (INDUCTOR, BUDGETED, FEWBIT)
"""Their names in files; the first is what the others are compared with."""
TITLES: Mapping[str, str] = {INDUCTOR: INDUCTOR, BUDGETED: f"inductor, budget {BUDGET}", FEWBIT: FEWBIT}
"""Their names on the screen."""

Backend = str | Callable[..., Any]


def backend_of(name: str, **fewbit: Any) -> Backend:
    """What torch.compile is to be given as its backend.

    Args:
        name: One of :data:`BACKENDS`.
        **fewbit: Options of fewbit.
    """
    if name == FEWBIT:
        return fewbit_fx.backend(**fewbit)
    return WithinBudget(name, BUDGET, lookup_backend("inductor")) if name == BUDGETED else name


def saved_bytes_within_budget(model: nn.Module, inputs: Sequence[torch.Tensor]) -> int:
    """Bytes that inductor saves for the backward with the budget, without parameters."""
    with within_budget():
        return fewbit_fx.explain(model, *inputs, fewbit_config=fewbit_fx.FewBitConfig(**NOTHING_CODED)).plain_bytes


NOTHING_CODED: Mapping[str, Any] = {"recipe": "exact", "recompute": False, "masks": False}
"""Options with which fewbit saves what torch.compile saves."""


class WithinBudget:
    """A backend with a budget, which holds for its own compilations alone, whenever they come.

    The setting is global, and Dynamo hands a model what it has compiled of the same code for a like backend: an object
    of its own is like no other.

    Args:
        name: What torch's messages call it.
        budget: torch's ``activation_memory_budget``.
        backend: Takes a graph and its inputs.
    """

    def __init__(self, name: str, budget: float, backend: Callable[..., Any]) -> None:
        self.__name__ = name
        self._budget, self._backend = budget, backend

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        with activation_memory_budget(self._budget):
            return self._backend(gm, example_inputs)  # type: ignore[no-any-return]


def within_budget() -> AbstractContextManager[None]:
    """Where torch.compile has the budget."""
    return activation_memory_budget(BUDGET)
