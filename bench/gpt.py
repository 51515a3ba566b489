"""A small byte-level GPT, as people write it: no trick for fewbit."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes. ``lora_rank`` above 0 freezes all but low-rank adapters on the attention's projections."""

    vocabulary: int = 256
    layers: int = 4
    heads: int = 4
    width: int = 256
    context: int = 256
    dropout: float = 0.1
    lora_rank: int = 0


class LowRankLinear(nn.Module):
    """A frozen linear layer plus a trained update of low rank (Hu et al., LoRA, arXiv 2106.09685)."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = _projection(config, config.width, 3 * config.width)
        self.out = _projection(config, config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def _projection(config: GPTConfig, inputs: int, outputs: int) -> nn.Module:
    if config.lora_rank:
        return LowRankLinear(inputs, outputs, config.lora_rank)
    return nn.Linear(inputs, outputs)


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """Attention and MLP, each normalised before, dropped out and added after."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(config.width), Attention(config)
        self.norm2, self.mlp = nn.LayerNorm(config.width), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


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
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(
                    (".down." in name and "attention" in name) or (".up." in name and "attention" in name)
                )

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
