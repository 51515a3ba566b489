"""Every test starts from a fresh Dynamo and a seed, with compiled kernels in a folder of the session's.

With pytest-xdist each process has a session, and so a folder, of its own: tests see no kernels of the others.
"""

from __future__ import annotations

import math
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

SAMPLES_PASSED: Counter[str] = Counter()  # of torch's operator database, by the way they took


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow the cases of a test that ``one_in`` leaves out, as a hash of their names has it."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("one_in"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for of_test in cases.values():
        (n,) = of_test[0].get_closest_marker("one_in").args
        of_test.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in of_test[math.ceil(len(of_test) / n) :]:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its count over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["samples_passed"] = dict(SAMPLES_PASSED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of pytest-xdist is done."""
    SAMPLES_PASSED.update(getattr(node, "workeroutput", {}).get("samples_passed", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if SAMPLES_PASSED:
        counts = ", ".join(f"{count} through the {way}" for way, count in sorted(SAMPLES_PASSED.items()))
        terminalreporter.write_line(f"samples of torch's operator database passed: {counts}")


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(autouse=True)
def _fresh_start() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
