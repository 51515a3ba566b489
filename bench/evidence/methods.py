"""The ways to train with less memory that are compared, each as what it does to a model before it is trained.

Every method is given the same model. The rivals are torch.compile as it comes, its recomputation at two budgets,
checkpoints around blocks, and Inductor's own fp8 codes of what is saved.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fewbit_fx
from bench.backends import Backend, WithinBudget
from fewbit_fx.torch_private.inductor import activation_memory_budget, compile_with_inductor


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: As tables, files and flags have it.
        family: What it is a variant of; a plot has a colour and a marker for each.
        options: Of fewbit, for what it compiles or converts; None where it has no part.
        budget: torch's ``activation_memory_budget`` while this method compiles.
        inductor: Options of Inductor.
        compiled: Whether torch.compile has a part.
        checkpointed: Whether each block is computed again as a whole.
    """

    name: str
    family: str
    options: Mapping[str, Any] | None = None
    budget: float = 1.0
    inductor: Mapping[str, Any] = field(default_factory=dict)
    compiled: bool = True
    checkpointed: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether the gradient is that of PyTorch but for the order of sums."""
        approximates = self.options is not None and self.options.get("recipe") != "exact"
        return not approximates and not self.inductor

    def applied(self, model: nn.Module) -> nn.Module:
        """The model, changed in place where the method does that, and compiled where it does that.

        The compilation comes with the first call.
        """
        if self.checkpointed:
            for block in blocks(model):
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore
        if not self.compiled and self.options is not None:
            fewbit_fx.convert(model, **self.options)
        return torch.compile(model, backend=self.backend(), dynamic=False) if self.compiled else model  # type: ignore

    def backend(self) -> Backend:
        """What torch.compile is to be given as its backend, an object of its own."""
        if self.options is not None:
            return WithinBudget(self.name, self.budget, fewbit_fx.backend(**self.options))
        inductor = functools.partial(compile_with_inductor, partitioner=None, mode=None, options=dict(self.inductor))
        return WithinBudget(self.name, self.budget, inductor)

    def settings(self) -> AbstractContextManager[None]:
        """Where torch's global settings are this method's."""
        return activation_memory_budget(self.budget)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What is checkpointed: the members of each list of modules that is in no other such list."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


def _fp8(kind: str) -> Method:
    """Inductor's fp8 codes, with every option set: some have two defaults that do not go together.

    The threshold is that of fewbit, in place of 100 MB; a tensor has a scale of its own.
    """
    options = {
        "quant_type": f"torch.float8_{kind}",
        "use_scaling": True,
        "size_in_mb": 2 * 4096 / 2**20,
        "exclude_primals": True,
        "allowed_dtypes": "torch.bfloat16;torch.float32",
    }
    patch = {"post_grad_fusion_options": {"activation_quantization_aten_pass": options}}
    return Method(f"fp8 {kind}", "inductor fp8", inductor=patch)


def _all() -> Iterator[Method]:
    yield Method("eager", "eager", compiled=False)
    yield Method("inductor", "inductor")
    yield Method("budget 0.9", "inductor, budget", budget=0.9)
    yield Method("budget 0.5", "inductor, budget", budget=0.5)
    yield Method("checkpoint", "checkpoint per block", checkpointed=True)
    yield from map(_fp8, ("e4m3fn", "e5m2"))
    for bits in (1, 2, 3, 4):
        options = {"recipe": "derivatives", "levels": "sampled", "bits": bits}
        yield Method(f"derivatives, {bits} bit{'s' * (bits > 1)}", "fewbit, derivatives", options)
    for recipe in ("exact", "default", "lean"):
        yield Method(recipe, f"fewbit, {recipe}", {"recipe": recipe})
    for recipe in ("default", "lean"):
        yield Method(f"{recipe}, budget 0.9", f"fewbit, {recipe}", {"recipe": recipe}, budget=0.9)
    for recipe in ("default", "lean"):
        yield Method(f"{recipe}, stochastic", f"fewbit, {recipe}", {"recipe": recipe, "rounding": "stochastic"})
    yield Method("drop-ins, 3 bits", "fewbit, eager drop-ins", {"bits": 3}, compiled=False)


METHODS: Mapping[str, Method] = {method.name: method for method in _all()}
"""By name, in the order of tables."""
REFERENCE = "inductor"
"""What the others are compared with."""
OF_MEMORY = tuple(name for name in METHODS if "stochastic" not in name)
"""Those that differ in memory."""
OF_CONVERGENCE = (
    REFERENCE,
    *(name for name in METHODS if name.startswith("derivatives")),
    "default",
    "lean",
    "default, stochastic",
    "lean, stochastic",
)
"""Those that differ in the gradient and that users choose between."""
