"""A callback for the Trainer of transformers, and for those that inherit from it, such as TRL's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fewbit_fx.dynamo.fewbit_backend import backend, last_report
from fewbit_fx.dynamo.verifier import Loss, Verification, Watch
from fewbit_fx.integrations.numbers import Numbers
from fewbit_fx.reporting.report import Report
from fewbit_fx.torch_private.modules import is_compiled


class FewBitCallback(TrainerCallback):  # type: ignore[misc]  # its types are not followed
    """Compile the model with fewbit when training begins, and log what that saves.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[FewBitCallback(recipe="lean")])

    By then the Trainer has done what comes before compiling: adapters, activation checkpointing, mixed precision. The
    model is compiled in place, as by ``model.compile(backend="fewbit")``, so that checkpoints keep their names. One
    that you have compiled yourself stays as it is.

    The log gets ``fewbit/saved_bytes``, ``fewbit/saved_bytes_inductor`` and ``fewbit/saving`` once they are known, and
    with ``every`` also ``fewbit/gradient_error`` and ``fewbit/gradient_error_of_noise``. They are in
    ``trainer.state.log_history`` and on the console. A Trainer tells reporters, such as W&B, before callbacks;
    ``trainer.callback_handler.callbacks.insert(0, FewBitCallback())`` puts this one first.

    Args:
        every: Steps from one measurement of the gradient's error to the next, the first step included; None for no
            measurement. Each takes a few eager steps of a batch of rows chosen at random.
        loss: Takes the model and a batch by names, returns a scalar. Without it, the loss is the model's own.
        **options: As of :func:`fewbit_fx.backend`; for a model that you compiled, those that you gave.

    Attributes:
        backend: What the model is compiled with.
        history: The step and what was found of each measurement.

    Raises:
        TypeError, ValueError: An unknown option, or one with a value that is not allowed.
    """

    def __init__(self, *, every: int | None = None, loss: Loss | None = None, **options: Any) -> None:
        if every is not None and every < 1:
            raise ValueError(f"FewBitCallback: every is {every!r}; allowed is a whole number of steps, 1 or more")
        self.backend = backend(**options)
        self.history: list[tuple[int, Verification]] = []
        self._every, self._loss = every, loss
        self._compiled_here = False
        self._numbers = Numbers(self._report)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse what cannot work, before anything is trained."""
        if args.torch_compile:
            raise ValueError(
                f"FewBitCallback: torch_compile_backend={args.torch_compile_backend!r} compiles the model too; leave "
                "torch_compile and torch_compile_backend out"
            )
        if self._every and (args.fsdp or args.deepspeed):
            raise ValueError("FewBitCallback: every=... needs all parameters on one device; FSDP and DeepSpeed shard")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Compile."""
        self.on_init_end(args, state, control)  # not called of a callback that is added later
        if not is_compiled(model):
            model.compile(backend=self.backend)
            self._compiled_here = True

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        train_dataloader: DataLoader[Any],
        **kwargs: Any,
    ) -> None:
        """Measure, if the step's turn has come."""
        if self._every is None or state.global_step % self._every or not state.is_world_process_zero:
            return
        batch = _random_batch(train_dataloader, args.per_device_train_batch_size, seed=state.global_step)
        model.train()  # as the step itself is about to do
        watch = Watch(model, loss=self._loss, fewbit_config=self.backend.config)
        found = watch.measure(state.global_step, (), send_to_device(batch, args.device))
        self.history.append((state.global_step, found))
        self._numbers.found(found)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Add what is new to the Trainer's own numbers."""
        new = self._numbers.take()
        logs.update(new)
        if state.log_history:
            state.log_history[-1].update(new)

    def _report(self) -> Report:
        return self.backend.last_report() if self._compiled_here else last_report()


def _random_batch(loader: DataLoader[Any], size: int, seed: int) -> Mapping[str, Any]:
    """Rows of a dataset, always the same for one seed; the training's own order and random state stay as they are."""
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset):
        raise ValueError("FewBitCallback: every=... chooses rows by number, which an iterable dataset does not have")
    rows = torch.randint(len(dataset), (size,), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=()):
        batch: Mapping[str, Any] = loader.collate_fn([dataset[row] for row in rows.tolist()])
    return batch
