"""Memory, time and error of methods on a model: ``python -m bench.evidence.memory SETTINGS...`` prints them as JSON.

A step is a forward and a backward: the optimizer is the same for all. Memory is what the allocator says. Times are
against torch.compile's default, in turns, afterwards. On a CPU each method has a process of its own, which has compiled
nothing else. On a GPU all methods of a model share one: its allocator tells what a step adds to what lives beside it.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.architectures import Example, quiet_libraries
from bench.evidence.cases import Case, Settings, answer_together, failure
from bench.evidence.first_gradient import FirstGradient
from bench.evidence.methods import METHODS, REFERENCE, Method
from bench.evidence.models import Scale, built
from bench.evidence.turns import alone, preparing
from bench.measure import Memory, keep_freed_memory, lived_bytes
from bench.timing import Timing, clock_for, compare
from fewbit_fx.torch_private.dynamo import each_compiled_anew

PART, SEED = "memory", 0
_COMPILATIONS = 1024  # of the same code: for each method, of a model's block for each of its layers


@dataclass(frozen=True)
class Result:
    """What one process found.

    Attributes:
        memory: Of a step.
        timing: Of a step; the ratio is to that of torch.compile's default.
        gradient_error: Relative error of the first gradient over all parameters; None for exact methods.
    """

    memory: Memory
    timing: Timing
    gradient_error: float | None


def case(model: str, method: str, scale: Scale, dtype: str, device: str, seconds: float) -> Case:
    """One method on one model.

    Args:
        model: One of bench.evidence.models.MODELS.
        method: One of bench.evidence.methods.METHODS.
        scale: Of the model.
        dtype: Of its parameters and data.
        device: cpu or cuda.
        seconds: Of timing.
    """
    settings = {
        "model": model,
        "method": method,
        "scale": asdict(scale),
        "dtype": dtype,
        "device": device,
        "seconds": seconds,
    }
    return Case(PART, f"{model}, {method}", settings, process=model if device == "cuda" else None)


class Step:
    """A forward and a backward, on the same data each time."""

    def __init__(self, example: Example, method: Method) -> None:
        self._example, self._parameters = example, [*example.model.parameters()]
        self._model = method.applied(example.model)

    def forward(self) -> Tensor:
        return self._example.loss(self._model(**self._example.inputs))

    def __call__(self) -> None:
        self.forward().backward()
        for parameter in self._parameters:
            parameter.grad = None


def measure(cases: Sequence[Settings]) -> list[dict[str, Any]]:
    """A result, or how it failed, for each of the cases, which differ in their method, in this process."""
    first, device = cases[0], torch.device(cases[0]["device"])
    methods = [METHODS[settings["method"]] for settings in cases]
    with preparing(), each_compiled_anew(_COMPILATIONS):
        build = functools.partial(sharing_parameters, example_of(first))
        first_gradient = FirstGradient(build, SEED)
        errors = {method.name: first_gradient.of(method) for method in methods}
        steps, memories, failures = {}, {}, {}
        for method in methods:
            try:
                step = Step(build(), method)
                memories[method.name] = memory_of(step, device)
                steps[method.name] = step
            except Exception as error:
                if len(methods) == 1:
                    raise
                failures[method.name] = failure(error)
        plain = steps.get(REFERENCE) or Step(build(), METHODS[REFERENCE])
        plain()
        torch.cuda.empty_cache()  # the other processes' turn
    with alone():
        timings = compare({REFERENCE: plain, **steps}, clock=clock_for(device), seconds=len(cases) * first["seconds"])
    found = {name: asdict(Result(memories[name], timings[name], errors[name])) for name in steps}
    return [found.get(m.name) or failures[m.name] for m in methods]


def sharing_parameters(example: Example) -> Example:
    """A copy with the same parameters: those of all methods would not fit beside each other."""
    return copy.deepcopy(example, {id(parameter): parameter for parameter in example.model.parameters()})


def memory_of(step: Step, device: torch.device) -> Memory:
    """Of a step, above what lives beside it and its own parameters."""
    step()
    lived = lived_bytes(device)
    memory = Memory.of_training(step, step.forward, device)
    return replace(memory, peak_bytes=memory.peak_bytes - lived)


def example_of(settings: Settings) -> Example:
    """The model of a case and its inputs."""
    dtype, device = getattr(torch, settings["dtype"]), torch.device(settings["device"])
    return built(settings["model"], Scale(**settings["scale"]), dtype, device, SEED)


def answer_for_memory(measure: Callable[[list[Settings]], list[Any]], arguments: Sequence[str] | None) -> None:
    """Be the process of cases that measure memory: quiet, and such that the allocator keeps what is freed.

    Args:
        measure: Takes the settings of each case, returns what JSON has for each.
        arguments: As of :func:`bench.evidence.cases.answer`.
    """
    warnings.simplefilter("ignore")
    quiet_libraries()
    keep_freed_memory()
    answer_together(measure, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the case that the command line has as JSON."""
    answer_for_memory(measure, arguments)


if __name__ == "__main__":
    main()
