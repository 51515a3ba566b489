"""Processes that prepare beside each other, and of which one alone takes times.

Preparing is mostly compilation, which a machine with a GPU has many cores for. While any process prepares, it may use
the GPU, so that times are taken when all are done with it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping

_VARIABLE = "FEWBIT_BENCH_TURNS"
"""The file that processes of one command lock."""


@contextlib.contextmanager
def turns_for_all() -> Iterator[Mapping[str, str]]:
    """What processes have to find in their environment to wait for each other."""
    with tempfile.NamedTemporaryFile() as file:
        yield {_VARIABLE: file.name}


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """While this process compiles and measures what others do not disturb."""
    with _locked(shared=True):
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While no other process prepares or takes times."""
    with _locked(shared=False):
        yield


@contextlib.contextmanager
def _locked(shared: bool) -> Iterator[None]:
    name = os.environ.get(_VARIABLE)
    if name is None or os.name != "posix":
        yield
        return
    import fcntl

    with open(name) as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
