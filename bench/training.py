"""Training one model with one backend, so that several can take turns in one process."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.backends import Backend
from bench.measure import flat_gradient
from bench.timing import clock_for

Batch = tuple[Tensor, Tensor]
PEAK_LEARNING_RATE = 2e-3  # warmed up to, then annealed to nothing
CLIP = 1.0


@dataclass
class Curve:
    """Losses by step."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, step: int, loss: float) -> None:
        """Append one point."""
        self.steps.append(step)
        self.losses.append(loss)


class Runner:
    """A model, its optimizer, its random state and the times of its steps.

    Runners made from one model and one seed see the same batches and draw the same dropout
    masks, however their steps are interleaved. Each step is timed where it is taken, by the clock of
    bench.timing but not by its compare, which would repeat it.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        backend: Backend,
        batches: Callable[[], Batch],
        steps: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.name = name
        self.model = copy.deepcopy(model)
        self.compiled = torch.compile(self.model, backend=backend)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=PEAK_LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, PEAK_LEARNING_RATE, total_steps=steps + 1)
        self.training, self.validation = Curve(), Curve()
        self.step_times: list[float] = []
        self.compile_time = float("nan")
        self.first_loss: Tensor | None = None
        self.first_gradient: Tensor | None = None
        self._batches, self._device, self._dtype, self._clock = batches, device, dtype, clock_for(device)
        with self._own_randomness(seed):
            pass

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return len(self.training.steps)

    def run(self, steps: int, done: Callable[[float], None]) -> None:
        """Take some steps; ``done`` is called with the loss after each."""
        with self._own_randomness():
            for _ in range(steps):
                done(self._step())

    def validate(self, batches: Sequence[Batch]) -> float:
        """Mean validation loss, by plain PyTorch: the same code for every backend."""
        self.model.eval()
        with torch.no_grad(), autocast(self._device, self._dtype):
            losses = [float(self.model(*self._to_device(batch))) for batch in batches]
        self.model.train()
        loss = sum(losses) / len(losses)
        self.validation.add(self.steps, loss)
        return loss

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch, by the compiled model."""
        with autocast(self._device, self._dtype):
            return self.compiled(*self._to_device(batch))  # type: ignore[no-any-return]

    def _step(self) -> float:
        batch = self._batches()
        if self.first_gradient is None:
            self.compile_time = self._clock(lambda: self._backward(batch), 1)
            self.first_loss, self.first_gradient = self._loss.cpu(), flat_gradient(self.model)
            self._update()
        else:
            self.step_times.append(self._clock(lambda: (self._backward(batch), self._update()), 1))
        self.training.add(self.steps, float(self._loss))
        return self.training.losses[-1]

    def _backward(self, batch: Batch) -> None:
        loss = self.forward(batch)
        loss.backward()
        self._loss = loss.detach()

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _to_device(self, batch: Batch) -> list[Tensor]:
        return [t.to(self._device) for t in batch]

    @contextlib.contextmanager
    def _own_randomness(self, seed: int | None = None) -> Iterator[None]:
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            if seed is not None:
                torch.manual_seed(seed)
            else:
                torch.set_rng_state(self._state)
                for device, state in zip(devices, self._device_states, strict=True):
                    torch.cuda.set_rng_state(state, device)
            try:
                yield
            finally:
                self._state = torch.get_rng_state()
                self._device_states = [torch.cuda.get_rng_state(d) for d in devices]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision in ``dtype``; nothing at all for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
