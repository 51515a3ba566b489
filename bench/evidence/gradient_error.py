"""How far a method's gradient is from the exact one, at any time of a training and without a trace in it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.backends import NOTHING_CODED
from bench.evidence.methods import METHODS, Method
from bench.evidence.tasks.task import Batch
from bench.measure import relative_error
from fewbit_fx.config import FewBitConfig
from fewbit_fx.dynamo.listener import Listener
from fewbit_fx.dynamo.partitioned_run import partitioned, undisturbed

Loss = Callable[[Callable[..., object], Batch], Tensor]
_EXACT = FewBitConfig(**NOTHING_CODED)


class GradientError:
    """Of one method on one model, relative to the norm of the exact gradient.

    What fewbit compiles is partitioned and run by plain ATen operations, without kernels; the graphs are kept for the
    next measurement. Other methods take the step themselves, on a copy of the model.

    Args:
        model: The model that trains, as it is before the method is applied to it.
        method: One that is not exact.
        loss: Of a model and a batch.
    """

    def __init__(self, model: nn.Module, method: Method, loss: Loss) -> None:
        self._model, self._loss = model, loss
        if method.compiled and method.options is not None:
            self._pair = [self._graphs(config, method) for config in (_EXACT, FewBitConfig(**method.options))]
        else:
            like = METHODS["inductor" if method.compiled else "eager"]
            self._pair = [self._copy(model, each) for each in (like, method)]

    def __call__(self, batch: Batch) -> float:
        """The error of the gradient of a batch, in the model's present state."""
        exact, coded = (gradient(batch) for gradient in self._pair)
        return relative_error(coded, exact)

    def _graphs(self, config: FewBitConfig, method: Method) -> Callable[[Batch], Tensor]:
        run = partitioned(lambda batch: self._loss(self._model, batch), config, Listener())

        def gradient(batch: Batch) -> Tensor:
            with undisturbed(self._model), method.settings():
                return _gradient(self._model, run(batch))

        return gradient

    def _copy(self, model: nn.Module, method: Method) -> Callable[[Batch], Tensor]:
        replica = copy.deepcopy(model)
        applied = method.applied(replica)

        def gradient(batch: Batch) -> Tensor:
            with undisturbed(self._model), torch.no_grad():
                for theirs, ours in zip(_state(replica), _state(self._model), strict=True):
                    theirs.copy_(ours)
                with torch.enable_grad():
                    return _gradient(replica, self._loss(applied, batch))

        return gradient


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """As one vector, of float64 on the CPU; what gets none is left out."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return torch.cat([g.double().cpu().flatten() for g in found if g is not None])
