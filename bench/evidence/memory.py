"""Memory, time and error of one method on one model: ``python -m bench.evidence.memory SETTINGS`` prints them as JSON.

A step is a forward and a backward: the optimizer is the same for all. Memory is what the allocator says, in a process
that has compiled nothing else. Times are against torch.compile's default, in turns, afterwards.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.architectures import Example, quiet_libraries
from bench.evidence.cases import Case, answer
from bench.evidence.first_gradient import first_gradient_error
from bench.evidence.methods import METHODS, REFERENCE, Method
from bench.evidence.models import Scale, built
from bench.measure import Memory, keep_freed_memory
from bench.timing import Timing, clock_for, compare

PART, SEED = "memory", 0


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
    return Case(PART, f"{model}, {method}", settings)


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


def measure(settings: dict[str, Any]) -> Result:
    """All of a case, in this process."""
    method, device = METHODS[settings["method"]], torch.device(settings["device"])
    build = functools.partial(example_of, settings)
    error = first_gradient_error(build, method, SEED)
    torch.compiler.reset()
    step = Step(build(), method)
    memory = Memory.of_training(step, step.forward, device)
    steps = {REFERENCE: step if method.name == REFERENCE else Step(build(), METHODS[REFERENCE]), method.name: step}
    timings = compare(steps, clock=clock_for(device), seconds=settings["seconds"])
    return Result(memory, timings[method.name], error)


def example_of(settings: dict[str, Any]) -> Example:
    """The model of a case and its inputs."""
    dtype, device = getattr(torch, settings["dtype"]), torch.device(settings["device"])
    return built(settings["model"], Scale(**settings["scale"]), dtype, device, SEED)


def answer_for_memory(measure: Callable[[dict[str, Any]], Any], arguments: Sequence[str] | None) -> None:
    """Be the process of a case that measures memory: quiet, and such that the allocator keeps what is freed.

    Args:
        measure: Takes the settings, returns a dataclass.
        arguments: As of :func:`bench.evidence.cases.answer`.
    """
    warnings.simplefilter("ignore")
    quiet_libraries()
    keep_freed_memory()
    answer(lambda settings: asdict(measure(settings)), arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the case that the command line has as JSON."""
    answer_for_memory(measure, arguments)


if __name__ == "__main__":
    main()
