"""Faults of our own code: the stage that each is of, and one warning in the place of an exception."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

logger = logging.getLogger("fewbit_fx")

GRAPH_EXACT = "left a graph exact"
NO_REPORT = "has no complete report of a graph"


class Fault(Exception):  # noqa: N818  (what it holds may be an error)
    """An exception in a stage of our own.

    Attributes:
        name: The stage, such as ``the pass 'find'``.
        cause: The exception.
    """

    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(f"{cause!r} in {name}")
        self.name = name
        self.cause = cause


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Tell of an exception which stage it is of. Of stages within each other the innermost is told.

    Raises:
        Fault: In the place of any exception but those that end a program.
    """
    try:
        yield
    except Fault:
        raise
    except Exception as cause:
        raise Fault(name, cause) from cause


@dataclass
class Faults:
    """The faults while one graph is compiled.

    Attributes:
        strict: The option of this name.
        found: What each fault led to, and the fault.
    """

    strict: bool
    found: list[tuple[str, Fault]] = field(default_factory=list)

    @contextlib.contextmanager
    def of(self, name: str, consequence: str) -> Iterator[None]:
        """Go on behind this block after a fault in it, whatever it is.

        Args:
            name: What :func:`stage` is told.
            consequence: What the fault leads to: "fewbit-fx ...".

        Raises:
            Exception: With the option ``strict``, the exception itself.
        """
        caught: Fault | None = None
        try:
            with stage(name):
                yield
        except Fault as fault:
            caught = fault
        if caught is not None:
            if self.strict:
                raise caught.cause
            self.found.append((consequence, caught))

    def warn(self) -> None:
        """Tell the user of the first fault; those that follow are often the same once more."""
        for _, fault in self.found:
            logger.debug("fault in fewbit-fx", exc_info=fault)
        for consequence, fault in self.found[:1]:
            warnings.warn(
                f"fewbit-fx {consequence} after a fault of its own ({fault}). Training goes on, with no wrong "
                f"gradient. Please report it, with this message and what `python -m fewbit_fx env` prints; the option "
                f"strict=True raises the fault, with its traceback.",
                stacklevel=2,
            )
