"""What figures were measured on and of: the processor, the versions and the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

CHECKOUT = Path(__file__).parent.parent
UNKNOWN = "unknown"
_NOT_MEASURED = (":!bench/results", ":!*.md")  # a run that wrote its results leaves the code as it was
_CPU_INFO = Path("/proc/cpuinfo")


def processor() -> str:
    """The CPU's model, its cores as the system counts them, and torch's threads."""
    model = _cpu_model() or f"CPU {platform.machine()}"
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _cpu_model() -> str | None:
    """Such as ``AMD EPYC 7763 64-Core Processor``; None where the system does not say."""
    sources = _read(_CPU_INFO), _output("lscpu"), _output("sysctl", "machdep.cpu.brand_string")
    found = (re.search(r"^(?:model name|machdep.cpu.brand_string)\s*:\s*(\S.*)$", s, re.I | re.M) for s in sources)
    return next((match[1] for match in found if match), None)


def versions() -> dict[str, str]:
    """Versions of what generates the code, and of what runs it."""
    others = {name: _installed(name) for name in ("triton", "numpy")}
    return {"torch": torch.__version__, **others, "python": platform.python_version()}


def commit(checkout: Path = CHECKOUT) -> str:
    """The short hash of the commit that is checked out, with ``+changes`` where tracked code differs from it.

    Returns:
        ``unknown`` where the folder is not the top of a checkout, or where there is no git.
    """
    git = ("git", "-C", str(checkout))
    folder, _, found = _output(*git, "rev-parse", "--show-prefix", "--short", "HEAD").partition("\n")
    if folder or not found:
        return UNKNOWN
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", *_NOT_MEASURED)
    return found.strip() + "+changes" * bool(changes)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _output(*command: str) -> str:
    """What a command prints; nothing where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
