"""A training loop with Lightning Fabric, in bfloat16: python examples/lightning_fabric.py.

A network of two layers learns which byte follows eight others, in a module of Python's. It prints

loss 5.5598 to 2.2348
saved for backward: 155,648 bytes instead of 1,196,032
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fewbit_fx


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, print the loss and the bytes, and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    flags = parser.parse_args(argv)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, 32), nn.Flatten(), nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    windows = text.unfold(0, 9, 1)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    data = fabric.setup_dataloaders(
        DataLoader(TensorDataset(windows[:, :8], windows[:, 8]), batch_size=256, shuffle=True)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = fabric.setup(torch.compile(model, backend="fewbit"), optimizer)

    losses: list[float] = []
    for (context, following), _ in zip(data, range(flags.steps), strict=False):
        loss = nn.functional.cross_entropy(model(context), following)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    report = fewbit_fx.last_report()
    fabric.print(f"loss {losses[0]:.4f} to {losses[-1]:.4f}")
    fabric.print(f"saved for backward: {report.fewbit_bytes:,} bytes instead of {report.plain_bytes:,}")
    return losses


if __name__ == "__main__":
    main()
