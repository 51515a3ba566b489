"""A transformer block in operations that Inductor compiles itself, attention included: no kernel from outside."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP.

    Args:
        activation: Of the MLP; it may bring whatever surrounds it.
        dropout: Probability, of both branches.
        width: Of the model, a multiple of 4.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor], dropout: float, width: int = 256) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation, self.drop = activation, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / 8).softmax(-1)
        x = x + self.drop(self.out((weights @ v).transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(self.activation(self.up(self.norm2(x)))))
