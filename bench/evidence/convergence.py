"""Train a task once with one method, and tell how well that went and how wrong its gradients were.

python -m bench.evidence.convergence '{"task": "digits, ViT", "method": "default", "seed": 0, "steps": 300, ...}'

A seed decides the weights that are not pretrained, the order of batches, and dropout, alike for every method that
torch.compile has a part in. Validation is by plain PyTorch, the same code for every method. On a GPU the seeds of a
task and method share a process, and the error of gradients is measured with the first of them alone: a small model
trains in seconds there, and compiling it would be the most of the time.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.evidence.cases import Case, answer
from bench.evidence.gradient_error import GradientError
from bench.evidence.methods import METHODS, REFERENCE, Method
from bench.evidence.tasks import DATA, TASKS
from bench.evidence.tasks.task import Batch, Task, loss_of
from bench.training import CLIP, autocast

_WARM_UP = 0.08  # of all steps
_POINTS = 50  # of a curve, at most


@dataclass(frozen=True)
class Training:
    """What one training needs beside its task and method.

    Attributes:
        task: What is trained.
        method: How.
        seed: Of weights, batches and dropout.
        steps: How many.
        device: Where.
        dtype: Other than float32: autocast.
        measures_error: Whether the error of gradients is told, of a method that has any.
    """

    task: Task
    method: Method
    seed: int
    steps: int
    device: torch.device
    dtype: torch.dtype
    measures_error: bool

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Training:
        """What a case's settings say."""
        task, method = TASKS[settings["task"]], METHODS[settings["method"]]
        device, dtype = torch.device(settings["device"]), getattr(torch, settings["dtype"])
        measures_error = settings.get("measures_error", True) and not method.is_exact
        return cls(task, method, settings["seed"], settings["steps"], device, dtype, measures_error)

    def start(self, data: str | None) -> tuple[nn.Module, Iterator[Batch], Sequence[Batch]]:
        """The model, batches to train on and batches to validate on: alike for every method.

        Args:
            data: The folder that the user has the data in.
        """
        found = self.task.data(data)
        torch.manual_seed(self.seed)
        model = self.task.model().to(self.device).train()
        batches = found.batches(torch.Generator().manual_seed(self.seed))
        return model, map(self._placed, batches), [self._placed(batch) for batch in found.validation]

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Of a batch, in the precision that is asked for."""
        with autocast(self.device, self.dtype):
            return loss_of(model, batch)

    def scores(self, model: nn.Module, validation: Sequence[Batch]) -> dict[str, float]:
        """The task's metrics, of a model that is not compiled."""
        model.eval()
        with torch.no_grad(), autocast(self.device, self.dtype):
            return self.task.scores(model, validation)

    def _placed(self, batch: Batch) -> Batch:
        return {name: values.to(self.device) for name, values in batch.items()}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Train once; what came of it, as JSON."""
    torch.compiler.reset()
    started = time.perf_counter()
    training = Training.of(settings)
    model, batches, validation = training.start(os.environ.get(DATA))
    losses, errors = _train(training, model, batches)
    return {
        "metrics": training.scores(model, validation),
        "curve": thinned(losses),
        "gradient_error": errors,
        "tokens_per_step": training.task.per_step,
        "unit": training.task.unit,
        "seconds": time.perf_counter() - started,
    }


def _train(
    training: Training, model: nn.Module, batches: Iterator[Batch]
) -> tuple[list[float], dict[str, float] | None]:
    """The loss of each step, and the error of the gradient at the first and halfway; None where it is not measured."""
    error = GradientError(model, training.method, training.loss) if training.measures_error else None
    compiled = training.method.applied(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], training.task.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_peak(step, training.steps))
    losses, errors, names = [], {}, {0: "first", training.steps // 2: "halfway"}
    torch.manual_seed(training.seed)
    for step, batch in zip(range(training.steps), batches, strict=False):
        if error is not None and step in names:
            errors[names[step]] = error(batch)
        loss = training.loss(compiled, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses, errors if error is not None else None


def _share_of_peak(step: int, steps: int) -> float:
    """Up in a line, then down in a line to nothing after the last step."""
    warm_up = max(1, round(_WARM_UP * steps))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def thinned(losses: Sequence[float], points: int = _POINTS) -> dict[str, list[float]]:
    """A curve of few points, each the mean of neighbouring steps and at the last of these."""
    size = -(-len(losses) // points)
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    ends = [min((i + 1) * size, len(losses)) for i in range(len(parts))]
    return {"steps": list(map(float, ends)), "losses": [statistics.fmean(part) for part in parts]}


def cases(
    tasks: Iterable[str],
    methods: Iterable[str],
    seeds: Iterable[int],
    device: str,
    dtype: str = "float32",
    steps: int | None = None,
) -> list[Case]:
    """A training for each task, seed and method, in this order.

    Args:
        tasks: Names in :data:`bench.evidence.tasks.TASKS`.
        methods: Names in :data:`bench.evidence.methods.METHODS`.
        seeds: Of each.
        device: ``cpu`` or ``cuda``.
        dtype: Other than float32: autocast.
        steps: Of each training; None for what the task says.
    """
    methods, seeds = list(methods), list(seeds)

    def others(task: str, seed: int) -> dict[str, Any]:
        more = {"measures_error": seed == seeds[0]} if device == "cuda" else {}
        return {"steps": steps or TASKS[task].steps, "device": device, "dtype": dtype, **more}

    return [
        _case(TASKS[task], method, seed, others(task, seed)) for task in tasks for seed in seeds for method in methods
    ]


def _case(task: Task, method: str, seed: int, others: dict[str, Any]) -> Case:
    settings = {"task": task.name, "method": method, "seed": seed, **others}
    name = f"{task.name}, {method}"
    return Case("convergence", f"{name}, seed {seed}", settings, process=name if others["device"] == "cuda" else None)


def quick_cases(device: str = "cpu") -> list[Case]:
    """Two that take seconds."""
    return cases(["digits, ResNet of SiLU"], [REFERENCE, "default"], [0], device, steps=30)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the settings say, which are the one argument, as JSON; print the result in a line."""
    answer(measure, arguments)


if __name__ == "__main__":
    main()
