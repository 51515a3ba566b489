"""The version of fewbit-fx, and the versions of torch that it runs on."""

from __future__ import annotations

import torch

__version__ = "0.1.0"
MINIMUM_TORCH = (2, 11)


def require_torch(version: str = torch.__version__) -> None:
    """Raise ImportError for a torch that is too old, before anything of it is used."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if release < MINIMUM_TORCH:
        allowed = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(f"fewbit-fx found torch {version}; allowed is torch >= {allowed}")
