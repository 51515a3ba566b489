"""Byte-level language models on the source of the standard library, at several depths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from bench.corpus import Corpus
from bench.evidence.tasks.task import LOSS, Batch, Data, Task, mean_loss
from bench.gpt import GPT, GPTConfig
from bench.llama import Llama, LlamaConfig

_CONTEXT, _BATCH = 128, 4
_WIDTH = 128  # half of what the models have otherwise, for 24 layers are to be trained in minutes
_STEPS = {4: 400, 12: 300, 24: 200}
_VALIDATION_BATCH, _VALIDATION_BATCHES = 16, 16
_MODELS: Mapping[str, Callable[[int], nn.Module]] = {
    "GPT": lambda layers: GPT(GPTConfig(width=_WIDTH, layers=layers, context=_CONTEXT)),
    "Llama": lambda layers: Llama(
        LlamaConfig(width=_WIDTH, inner_width=LlamaConfig.inner_width // 2, layers=layers, context=_CONTEXT)
    ),
}


def tasks() -> Iterator[Task]:
    """Each model at each depth; nothing else differs between depths."""
    for name, model in _MODELS.items():
        for layers, steps in _STEPS.items():
            yield Task(
                f"{name}, {layers} layers",
                "language",
                functools.partial(model, layers),
                _data,
                (LOSS.name,),
                _scores,
                1e-3,
                steps,
                _BATCH * _CONTEXT,
                "bytes",
            )


def _data(_: str | None) -> Data:
    corpus = Corpus.of_standard_library()

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield _named(*corpus.batch(_BATCH, _CONTEXT, generator))

    held_out = corpus.validation_batches(_VALIDATION_BATCH, _CONTEXT, _VALIDATION_BATCHES)
    return Data(batches, [_named(*batch) for batch in held_out])


def _named(inputs: torch.Tensor, targets: torch.Tensor) -> Batch:
    return {"inputs": inputs, "targets": targets}


def _scores(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    return {LOSS.name: mean_loss(model, batches)}
