"""A small ResNet of basic blocks for small images (He et al., arXiv 1512.03385)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class ResNet(nn.Module):
    """Images in, the mean cross-entropy of their classes out (in nats).

    Args:
        activation: Makes the nonlinearity.
        widths: Channels of each block; from the second on a block halves the image.
        channels: Of the images.
        classes: How many.
    """

    def __init__(
        self,
        activation: Callable[[], nn.Module],
        widths: tuple[int, ...],
        channels: int = 1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_convolution(channels, widths[0], 1), activation())
        entering = (widths[0], *widths[:-1])
        self.blocks = nn.ModuleList(
            _Block(inputs, outputs, 2 if i else 1, activation)
            for i, (inputs, outputs) in enumerate(zip(entering, widths, strict=True))
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x.mean((2, 3))).float(), classes)


class _Block(nn.Module):
    """Two convolutions, and the way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *_convolution(inputs, outputs, stride), activation(), *_convolution(outputs, outputs, 1)
        )
        same = inputs == outputs and stride == 1
        self.around = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.around(x) + self.inner(x))


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)
