"""What Dynamo knows of the compilation under way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

import torch
from torch._dynamo import lookup_backend, register_backend  # the registry behind torch.compile(backend="name")
from torch._guards import CompileContext

__all__ = ["compile_id", "compiled_callable", "each_compiled_anew", "lookup_backend", "register_backend"]


def compile_id() -> str:
    """Dynamo's id of the compilation under way, such as ``0/1`` (frame/recompile), or ``-``."""
    current = CompileContext.current_compile_id()
    return str(current) if current is not None else "-"


def each_compiled_anew(times: int) -> AbstractContextManager[None]:
    """Let the same code be compiled so often, with a backend each; Dynamo runs it uncompiled beyond its limit.

    An error tells of what goes beyond.
    """
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(
        recompile_limit=times, accumulated_recompile_limit=2 * times, fail_on_recompile_limit_hit=True
    )
    return patched


def compiled_callable() -> Callable[..., Any] | None:
    """Find what was handed to torch.compile in the compilation under way; None if it is not found.

    Dynamo does not tell a backend. But the wrapper that torch.compile returns is on the stack, and holds it in
    its free variable ``fn``: a function or, of a module, a bound method. Modules whose forward is torch's own are
    wrapped once more, by ``wrap_inline``.
    """
    frame = sys._getframe()
    while frame.f_code.co_name != "compile_wrapper" or frame.f_globals.get("__name__") != "torch._dynamo.eval_frame":
        if frame.f_back is None:
            return None
        frame = frame.f_back
    found: Callable[..., Any] | None = frame.f_locals.get("fn")
    if isinstance(found, FunctionType) and found.__globals__.get("__name__") == "torch._dynamo.external_utils":
        found = getattr(found, "__wrapped__", found)
    return found
