"""Real text that every machine has: the source of the running Python's standard library."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_EVERY_NTH_FILE_IS_HELD_OUT = 20


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on, and bytes of other files to validate on; uint8, shape (n,)."""

    training: Tensor
    validation: Tensor

    @classmethod
    def of_standard_library(cls) -> Corpus:
        """All top-level modules and packages, without tests and installed packages."""
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(f for f in root.rglob("*.py") if not _excluded(f.relative_to(root)))
        held_out = set(files[::_EVERY_NTH_FILE_IS_HELD_OUT])
        return cls(_read(f for f in files if f not in held_out), _read(held_out))

    def batch(self, size: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random windows of the training bytes: inputs and the bytes that follow them, int64."""
        starts = torch.randint(len(self.training) - context - 1, (size,), generator=generator)
        return _windows(self.training, starts, context)

    def validation_batches(self, size: int, context: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Evenly spaced windows of the held-out bytes, always the same."""
        starts = torch.linspace(0, len(self.validation) - context - 2, size * count).long()
        return [_windows(self.validation, part, context) for part in starts.split(size)]


def _windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _excluded(path: Path) -> bool:
    return any(part in ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__") for part in path.parts)


def _read(files: object) -> Tensor:
    text = b"\n".join(f.read_bytes() for f in sorted(files))  # type: ignore[call-overload]
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
