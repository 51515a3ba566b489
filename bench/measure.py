"""Measurements: bytes held after a forward, the gradient's relative error, the conditions."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


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
