"""The transformer block of all benchmarks, as people write it: no trick for fewbit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch's own kernel; all of shape (batch, heads, length, width of a head)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same of all to all."""
    return F.scaled_dot_product_attention(q, k, v)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of all to all in operations that Inductor compiles itself; shapes as of :func:`causal_attention`.

    It is not causal: a mask would be a kernel's input and a saved tensor of its own.
    """
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


@dataclass(frozen=True)
class BlockConfig:
    """Sizes and parts of a block.

    Attributes:
        width: Of the model, a multiple of ``heads``; the MLP's inner width is four times that.
        heads: Of the attention.
        dropout: Probability, of both branches.
        lora_rank: Above 0, the attention's projections are :class:`LowRankLinear` of that rank.
        activation: Makes the MLP's nonlinearity.
        attention: Takes queries, keys and values.
    """

    width: int = 256
    heads: int = 4
    dropout: float = 0.1
    lora_rank: int = 0
    activation: Callable[[], nn.Module] = nn.GELU
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = causal_attention


class LowRankLinear(nn.Module):
    """A frozen linear layer plus a trained update of low rank (Hu et al., LoRA, arXiv 2106.09685)."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=bias)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def train_adapters_alone(model: nn.Module) -> None:
    """Freeze all but the updates of low rank."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.down.requires_grad_()
            module.up.requires_grad_()


class Attention(nn.Module):
    """Self-attention between projections."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.heads, self.attend = config.heads, config.attention
        self.qkv = _projection(config, config.width, 3 * config.width)
        self.out = _projection(config, config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def _projection(config: BlockConfig, inputs: int, outputs: int) -> nn.Module:
    if config.lora_rank:
        return LowRankLinear(inputs, outputs, config.lora_rank)
    return nn.Linear(inputs, outputs)


class MLP(nn.Module):
    """Linear, nonlinearity, linear."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.act = config.activation()
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """Attention and MLP, each normalised before, dropped out and added after."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(config.width), Attention(config)
        self.norm2, self.mlp = nn.LayerNorm(config.width), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))
