"""Measurements: bytes held after a forward, the gradient's relative error, fresh processes, the conditions."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fewbit_fx
from fewbit_fx.reporting.words import action, because

_CHECKOUT = Path(__file__).parent.parent
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def held_bytes(forward: Callable[[], Tensor], device: torch.device) -> int:
    """Bytes that the allocator has given out during a forward and not got back when it returned.

    On the CPU the profiler adds up the allocator's own reports.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        result = forward()
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device) - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            result = forward()
        held = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    del result
    return held


def flat_gradient(model: nn.Module) -> Tensor:
    """All gradients of the model's parameters as one float64 vector on the CPU."""
    gradients = [p.grad.detach().double().cpu().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over norm of the reference."""
    return float((value - reference).norm() / reference.norm())


def what_happened(report: fewbit_fx.Report) -> tuple[str, ...]:
    """Each kind of site once, such as ``gelu: coded in 3 bits`` or ``mask: left exact, because ...``."""
    reasons = ((site, f", because {because(site.reason)}" if site.reason else "") for site in report.sites)
    return tuple(dict.fromkeys(f"{site.function}: {action(site)}{reason}" for site, reason in reasons))


def warm_up_the_compiler(device: torch.device) -> None:
    """What a process's first compilation pays once is then not charged to the one that is measured."""
    x = torch.ones(8, device=device, requires_grad=True)
    torch.compile(lambda t: t.sin().sum(), backend="inductor")(x).backward()


def in_fresh_process(module: str, flags: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """What ``python -m module *flags`` prints as JSON in its last line.

    Args:
        module: Such as ``bench.step``.
        flags: Its command line.
        environment: Variables to set beside this process's own.

    Raises:
        RuntimeError: The process failed; the message has its error output.
    """
    command = [sys.executable, "-m", module, *flags]
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, cwd=_CHECKOUT, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed for the next tensor, as torch's CUDA allocator does.

    glibc gives large tensors back to the system at once; of a kernel that writes 256 MiB, the page
    faults of getting them anew then take most of the time.

    Returns:
        Whether this system's malloc has the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def conditions(device: torch.device, notes: Iterable[str]) -> dict[str, str]:
    """What a reader needs to know to compare figures."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "settings": ", ".join(notes),
    }
