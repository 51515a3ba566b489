"""A callback for the Trainer of Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from fewbit_fx.config import FewBitConfig
from fewbit_fx.dynamo.fewbit_backend import last_report
from fewbit_fx.dynamo.verifier import Loss, Verification, Watch
from fewbit_fx.integrations.numbers import Numbers


class FewBitMonitor(pl.Callback):  # type: ignore[misc]  # its types are not followed
    """Log what fewbit saves in a LightningModule, which compiles its network itself.

        self.network = torch.compile(network, backend="fewbit")  # in the LightningModule
        trainer = Trainer(callbacks=[FewBitMonitor()])

    The loggers get ``fewbit/saved_bytes``, ``fewbit/saved_bytes_inductor`` and ``fewbit/saving`` once they are known,
    of the model that was compiled last in this process, and with ``every`` also ``fewbit/gradient_error`` and
    ``fewbit/gradient_error_of_noise``. They are in ``trainer.callback_metrics`` too.

    Args:
        every: Batches from one measurement of the gradient's error to the next, the first batch included; None for no
            measurement. Each takes a few eager steps of the batch.
        loss: Takes the module and a batch, its tensors by position or by names; returns a scalar. Needed with
            ``every``, for the training step itself logs.
        **options: Those of fewbit that the network was compiled with.

    Raises:
        TypeError, ValueError: An unknown option, one with a value that is not allowed, or ``every`` without ``loss``.
    """

    def __init__(self, *, every: int | None = None, loss: Loss | None = None, **options: Any) -> None:
        if every is not None and every < 1:
            raise ValueError(f"FewBitMonitor: every is {every!r}; allowed is a whole number of batches, 1 or more")
        if every and loss is None:
            raise ValueError("FewBitMonitor: every=... needs loss=..., a function of the module and a batch")
        self._every, self._loss, self._config = every, loss, FewBitConfig(**options)
        self._watch: Watch | None = None
        self._numbers = Numbers(last_report)

    @property
    def history(self) -> list[tuple[int, Verification]]:
        """The batch, counted from 0, and what was found of each measurement."""
        return self._watch.history if self._watch else []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, before anything is trained."""
        if self._every is None:
            return
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(f"FewBitMonitor: every=... needs all parameters on one device, not {trainer.strategy!r}")
        self._watch = Watch(pl_module, every=self._every, loss=self._loss, fewbit_config=self._config)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure, if the batch's turn has come."""
        if self._watch is None or not trainer.is_global_zero:
            return
        with trainer.precision_plugin.train_step_context():
            found = self._watch(**batch) if isinstance(batch, Mapping) else self._watch(*_as_sequence(batch))
        if found:
            self._numbers.found(found)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what is new."""
        new = self._numbers.take()
        trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in new.items()})
        for logger in trainer.loggers if new else ():
            logger.log_metrics(new, step=trainer.global_step)


def _as_sequence(batch: Any) -> Sequence[Any]:
    return batch if isinstance(batch, (list, tuple)) else (batch,)
