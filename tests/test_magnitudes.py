"""Magnitudes that are limited and compared by integers, as on a GPU, and by numbers, as on a CPU: the same result."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.offline_triton import gpu_layout
from fewbit_fx.codec.magnitudes import largest, within

numbers = st.lists(st.floats(width=32), min_size=1, max_size=64).map(torch.tensor)


@pytest.fixture(params=["numbers", "integers"])
def compared(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "numbers":
        yield
        return
    with gpu_layout():
        yield


@pytest.mark.usefixtures("compared")
@given(numbers)
def test_the_largest_magnitude(x: torch.Tensor) -> None:
    values = [abs(n) for n in x.tolist()]
    found = float(largest(x))
    assert math.isnan(found) if any(map(math.isnan, values)) else found == max(values)


@pytest.mark.usefixtures("compared")
@given(numbers, st.floats(2**-126, 2**127, width=32))
def test_numbers_within_a_limit(x: torch.Tensor, most: float) -> None:
    for n, found in zip(x.tolist(), within(x, most).tolist(), strict=True):
        if not math.isnan(n):
            assert found == math.copysign(min(abs(n), most), n)
            assert math.copysign(1, found) == math.copysign(1, n)
