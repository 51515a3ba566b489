"""torch's own traces of a compilation: its profile of times and its structured log, which tlparse shows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch._dynamo.utils import dynamo_timed
from torch._logging._internal import trace_structured

__all__ = ["artifact", "timed"]


def timed(name: str) -> AbstractContextManager[object]:
    """Count the time under this name in torch's compile profile (``torch._dynamo.utils.compile_times()``)."""
    context: AbstractContextManager[object] = dynamo_timed(name, log_pt2_compile_event=True)
    return context


def artifact(name: str, text: Callable[[], str]) -> None:
    """Leave a text for tlparse. It is made only if the environment has TORCH_TRACE."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
