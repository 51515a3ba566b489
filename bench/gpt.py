"""A small byte-level GPT of the benchmarks' transformer blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from bench.transformer import Block, BlockConfig, LowRankLinear, train_adapters_alone


@dataclass(frozen=True)
class GPTConfig(BlockConfig):
    """Sizes. ``lora_rank`` above 0 freezes all but low-rank adapters on the attention's projections."""

    vocabulary: int = 256
    layers: int = 4
    context: int = 256


class GPT(nn.Module):
    """Bytes in, the mean cross-entropy of the next bytes out (in nats)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary)
        self.apply(_initialise)
        if config.lora_rank:
            train_adapters_alone(self)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.drop(self.tokens(inputs) + self.positions.weight[: inputs.shape[1]])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, LowRankLinear):
        nn.init.zeros_(module.up.weight)
