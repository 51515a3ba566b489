"""What a training needs, whatever it is that is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]  # the model's arguments, by name


@dataclass(frozen=True)
class Metric:
    """What a trained model is judged by.

    Attributes:
        name: As tables have it.
        higher_is_better: Or lower.
        is_loss: In nats; otherwise a share, which tables show in points of a hundred.
    """

    name: str
    higher_is_better: bool = True
    is_loss: bool = False

    @property
    def factor(self) -> float:
        """Of what a table shows to a value."""
        return 1.0 if self.is_loss else 100.0

    def text(self, value: float) -> str:
        """A value or a difference as a table shows it."""
        return f"{self.factor * value:.{3 if self.is_loss else 1}f}"


LOSS = Metric("validation loss", higher_is_better=False, is_loss=True)
METRICS: Mapping[str, Metric] = {
    metric.name: metric for metric in (*map(Metric, ("accuracy", "F1", "Matthews", "Pearson", "Spearman")), LOSS)
}
"""By name."""


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is validated on.

    Attributes:
        batches: Without end, all of one shape; the generator decides their order.
        validation: Always the same.
    """

    batches: Callable[[torch.Generator], Iterator[Batch]]
    validation: Sequence[Batch]


@dataclass(frozen=True)
class Task:
    """One training.

    Attributes:
        name: Such as ``CoLA, LoRA``.
        group: Of similar tasks, such as ``GLUE``.
        model: Makes the model; torch's random state decides what is random in it. It is called with a batch by names,
            and returns the loss, or what has it as its attribute ``loss``.
        data: Reads it. Takes the folder that the user has it in, or None.
        metrics: Names in :data:`METRICS`, the one that counts first.
        scores: The metrics of a model in eval mode.
        learning_rate: At its peak.
        steps: Where nothing else is said.
        per_step: How many of ``unit`` a step sees.
        unit: Such as ``tokens``.
        needs_data: Whether ``data`` is of any use to it.
    """

    name: str
    group: str
    model: Callable[[], nn.Module]
    data: Callable[[str | None], Data]
    metrics: Sequence[str]
    scores: Callable[[nn.Module, Sequence[Batch]], dict[str, float]]
    learning_rate: float
    steps: int
    per_step: int
    unit: str
    needs_data: bool = False


def loss_of(model: Callable[..., Any], batch: Batch) -> Tensor:
    """The loss of a batch, whichever way the model returns it."""
    result = model(**batch)
    return getattr(result, "loss", result)  # type: ignore[no-any-return]


def shuffled(examples: Batch, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of examples in a new random order each epoch, without what is left over at its end."""
    count = len(next(iter(examples.values())))
    if count < size:
        raise ValueError(f"{count} examples are fewer than a batch of {size}")
    while True:
        for chosen in torch.randperm(count, generator=generator).split(size)[: count // size]:
            yield {name: values[chosen] for name, values in examples.items()}


def in_order(examples: Batch, size: int) -> list[Batch]:
    """All examples in batches, of which the last may be smaller."""
    parts = {name: values.split(size) for name, values in examples.items()}
    return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]


def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Of all examples, each counted alike."""
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    losses = [float(loss_of(model, batch)) for batch in batches]
    return sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)
