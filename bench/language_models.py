"""The byte-level language models of the benchmarks, by name: the same bytes in, the same kind of loss out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from bench.gpt import GPT, GPTConfig
from bench.llama import Llama, LlamaConfig

LAYERS, CONTEXT = GPTConfig.layers, GPTConfig.context  # of all of them, where nothing else is said
_LORA_RANK = 8


def language_model(name: str, lora: bool, layers: int = LAYERS, context: int = CONTEXT) -> nn.Module:
    """A model with random weights.

    Args:
        name: One of :data:`LANGUAGE_MODELS`.
        lora: Train only low-rank adapters on attention.
        layers: How many.
        context: Tokens in a sequence.
    """
    return LANGUAGE_MODELS[name](layers, context, _LORA_RANK if lora else 0)


LANGUAGE_MODELS: Mapping[str, Callable[[int, int, int], nn.Module]] = {
    "gpt": lambda layers, context, rank: GPT(GPTConfig(layers=layers, context=context, lora_rank=rank)),
    "llama": lambda layers, context, rank: Llama(LlamaConfig(layers=layers, context=context, lora_rank=rank)),
}
