"""Magnitudes that are limited and compared by integers, as on a GPU, and by numbers, as on a CPU: the same result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.offline_triton import gpu_layout
from fewbit_fx.codec.magnitudes import largest, within

numbers = st.lists(st.floats(width=32), min_size=1, max_size=64).map(torch.tensor)


Layout = Callable[[], AbstractContextManager[None]]
compared = pytest.mark.parametrize("layout", [contextlib.nullcontext, gpu_layout], ids=["numbers", "integers"])


@compared
@given(x=numbers)
def test_the_largest_magnitude(layout: Layout, x: torch.Tensor) -> None:
    values = [abs(n) for n in x.tolist()]
    with layout():
        found = float(largest(x))
    assert math.isnan(found) if any(map(math.isnan, values)) else found == max(values)


@compared
@given(x=numbers, most=st.floats(2**-126, 2**127, width=32))
def test_numbers_within_a_limit(layout: Layout, x: torch.Tensor, most: float) -> None:
    with layout():
        limited = within(x, most)
    for n, found in zip(x.tolist(), limited.tolist(), strict=True):
        if not math.isnan(n):
            assert found == math.copysign(min(abs(n), most), n)
            assert math.copysign(1, found) == math.copysign(1, n)
