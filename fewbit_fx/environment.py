"""What a bug report should say of the machine: versions, devices, compilers and options."""

from __future__ import annotations

import dataclasses
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from fewbit_fx._version import __version__
from fewbit_fx.config import FewBitConfig


def describe_environment() -> list[tuple[str, str]]:
    """Pairs of a name and a value, as ``python -m fewbit_fx env`` prints them; none names a user or a path."""
    return [
        ("fewbit-fx", __version__),
        ("torch", torch.__version__),
        ("triton", _installed("triton")),
        ("numpy", np.__version__),
        ("python", platform.python_version()),
        ("platform", f"{platform.system()} {platform.machine()}"),
        ("devices", ", ".join(_devices())),
        ("C++ compiler", next((name for name in ("g++", "clang++", "cl") if shutil.which(name)), "none found")),
        *((f"default of {name}", repr(value)) for name, value in dataclasses.asdict(FewBitConfig()).items()),
    ]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    found = [f"CPU ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"]
    if torch.cuda.is_available():
        found += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found
