"""Modes and transforms around a computation: which are active, and how to leave them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack  # None outside of torch.func's transforms
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode


@contextlib.contextmanager
def real_mode() -> Iterator[None]:
    """Leave whatever trace or transform is under way, with its fake tensor mode, to compute on real numbers."""
    with _disable_current_modes(), tracing(None), temporarily_clear_interpreter_stack():
        yield


def neutral_hooks() -> AbstractContextManager[None]:
    """Keep saved tensors from the hooks of others. Where hooks are forbidden, as in torch.func, there are none."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


def mode_of(x: Tensor) -> AbstractContextManager[Any]:
    """The mode in which tensors to go with x are made: its own if x is fake."""
    return x.fake_mode if isinstance(x, FakeTensor) else contextlib.nullcontext()


def runs_compiled(*tensors: Tensor) -> bool:
    """Whether compiled code may be called on these tensors.

    Not on fake, batched and other special ones, nor on those without data; nor where a dispatch mode or a
    transform of torch.func wants to see each operation.
    """
    observed = is_in_torch_dispatch_mode() or peek_interpreter_stack() is not None
    return not observed and all(type(t) in (Tensor, nn.Parameter) and t.device.type != "meta" for t in tensors)
