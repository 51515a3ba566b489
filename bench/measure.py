"""Measurements: memory in fresh processes, the gradient's relative error, the conditions."""

from __future__ import annotations

import ctypes
import datetime
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fewbit_fx
from bench.machine import CHECKOUT, commit, processor, versions

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def held_bytes(forward: Callable[[], Tensor], device: torch.device) -> int:
    """Bytes that the allocator has given out during a forward and not got back when it returned.

    On the CPU the profiler adds up the allocator's own reports.
    """
    gc.collect()  # or garbage that is freed meanwhile counts
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


def lived_bytes(device: torch.device) -> int:
    """What of :func:`peak_bytes` is there before a step already."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that the allocator has given out at one time during a step.

    On CUDA with all that lived before: weights, gradients, the optimizer's state. On the CPU above what lived before,
    because the profiler tells what the allocator gives out and takes back meanwhile.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == _ALLOCATION]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


_ALLOCATION = "[memory]"  # the profiler's name for what the allocator gives out and, below zero, takes back


@dataclass(frozen=True)
class Memory:
    """Memory of one model's training, in a process of its own.

    Attributes:
        held_bytes: Given out during a forward and not got back when it returned.
        peak_bytes: See :func:`peak_bytes`.
    """

    held_bytes: int
    peak_bytes: int

    @classmethod
    def of_training(cls, step: Callable[[], object], forward: Callable[[], Tensor], device: torch.device) -> Memory:
        """Measure here, from the third step on: the model is compiled, and the optimizer has its state."""
        for _ in range(2):
            step()
        peak = peak_bytes(step, device)
        return cls(held_bytes(forward, device), peak)

    @classmethod
    def in_fresh_process(cls, module: str, flags: Sequence[str], backend: str) -> Memory:
        """The same, by a process that sees no other model's memory.

        Args:
            module: A command with the flag --measure-memory, which prints a memory's fields as JSON.
            flags: Its other flags.
            backend: One of :data:`bench.backends.BACKENDS`.
        """
        return cls(**in_fresh_process(module, [*flags, f"--measure-memory={backend}"]))


def flat_gradient(model: nn.Module) -> Tensor:
    """All gradients of the model's parameters as one float64 vector on the CPU."""
    gradients = [p.grad.detach().double().cpu().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over norm of the reference."""
    return float((value - reference).norm() / reference.norm())


def what_happened(report: fewbit_fx.Report) -> tuple[str, ...]:
    """Each kind of site that something is saved for once, such as ``gelu: coded in 3 bits``."""
    saved = [site for site in report.sites if site.bytes_before or site.bytes_after]
    reasons = ((site, f", because {site.reason}" if site.reason else "") for site in saved)
    return tuple(dict.fromkeys(f"{site.function}: {site.action}{reason}" for site, reason in reasons))


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
    done = subprocess.run(command, cwd=CHECKOUT, env=variables, capture_output=True, text=True)
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
    """What a reader needs to know to compare figures; to be taken before a measurement, as files may change meanwhile.

    Args:
        device: What is measured.
        notes: The settings, such as ``bits 3``.
    """
    return {
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        **versions(),
        "date": datetime.date.today().isoformat(),
        "settings": ", ".join(notes),
    }
