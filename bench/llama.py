"""A small byte-level Llama: SwiGLU, RMSNorm, rotary embeddings, grouped queries; no dropout and no biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.transformer import LowRankLinear, causal_attention, train_adapters_alone


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes.

    Attributes:
        width: Of the model, a multiple of ``heads``.
        heads: Of the queries, a multiple of ``key_value_heads``.
        key_value_heads: Of the keys and values.
        inner_width: Of the MLP.
        lora_rank: Above 0, all but low-rank adapters on the attention's projections is frozen.
        vocabulary: How many tokens there are.
        layers: How many blocks.
        context: Tokens in a sequence, at most.
        rotary_base: Of the wavelengths of the rotary embeddings.
    """

    width: int = 256
    heads: int = 8
    key_value_heads: int = 2
    inner_width: int = 896
    lora_rank: int = 0
    vocabulary: int = 256
    layers: int = 4
    context: int = 256
    rotary_base: float = 10_000.0

    @property
    def head_width(self) -> int:
        """Of one head."""
        return self.width // self.heads


class Llama(nn.Module):
    """Bytes in, the mean cross-entropy of the next bytes out (in nats)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.rotary = Rotary(config)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(_initialise)
        if config.lora_rank:
            train_adapters_alone(self)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(inputs)
        cos, sin = self.rotary(inputs.shape[1])
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Rotary(nn.Module):
    """Cosines and sines by position and channel of a head (Su et al., RoFormer, arXiv 2104.09864)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        frequencies = config.rotary_base ** -(torch.arange(0, config.head_width, 2) / config.head_width)
        angles = torch.outer(torch.arange(config.context), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        return self.cos[:length], self.sin[:length]


class LlamaBlock(nn.Module):
    """Attention and MLP, each normalised before and added after."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(config.width, eps=1e-5), GroupedAttention(config)
        self.norm2, self.mlp = nn.RMSNorm(config.width, eps=1e-5), SwiGLU(config.width, config.inner_width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class GroupedAttention(nn.Module):
    """Causal self-attention between projections, with fewer heads for keys and values than for queries."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_width, self.group = config.head_width, config.heads // config.key_value_heads
        key_value_width = config.key_value_heads * config.head_width
        self.q = _projection(config, config.width, config.width)
        self.k = _projection(config, config.width, key_value_width)
        self.v = _projection(config, config.width, key_value_width)
        self.out = _projection(config, config.width, config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (_rotated(part, cos, sin) for part in (q, k))
        k, v = (part.repeat_interleave(self.group, dim=1) for part in (k, v))
        return self.out(causal_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The gated MLP (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner_width, bias=False)
        self.up = nn.Linear(width, inner_width, bias=False)
        self.down = nn.Linear(inner_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def _projection(config: LlamaConfig, inputs: int, outputs: int) -> nn.Module:
    if config.lora_rank:
        return LowRankLinear(inputs, outputs, config.lora_rank, bias=False)
    return nn.Linear(inputs, outputs, bias=False)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, LowRankLinear):
        nn.init.zeros_(module.up.weight)
