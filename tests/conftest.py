"""Every test starts from a fresh Dynamo and a seed, with compiled kernels in a folder of the session's."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

SAMPLES_PASSED: Counter[str] = Counter()  # of torch's operator database, by the way they took


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
