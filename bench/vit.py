"""A small vision transformer of the benchmarks' transformer blocks (Dosovitskiy et al., arXiv 2010.11929)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.transformer import Block, BlockConfig, full_attention


@dataclass(frozen=True)
class ViTConfig(BlockConfig):
    """Sizes: square images of ``image_size`` pixels, cut into square patches of ``patch_size``."""

    dropout: float = 0.0
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = full_attention
    layers: int = 4
    image_size: int = 64
    patch_size: int = 4
    channels: int = 3
    classes: int = 10

    @property
    def patches(self) -> int:
        """In an image."""
        return (self.image_size // self.patch_size) ** 2


class ViT(nn.Module):
    """Images in, the mean cross-entropy of their classes out (in nats)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patches = nn.Conv2d(config.channels, config.width, config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.empty(1, 1 + config.patches, config.width).normal_(std=0.02))
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(len(images), -1, -1), patches), 1)
        x = self.blocks(self.drop(tokens + self.positions))
        return F.cross_entropy(self.head(self.norm(x)[:, 0]).float(), classes)
