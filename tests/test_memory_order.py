"""The order of a tensor's elements in memory, which codes and what is decoded of them follow."""

from __future__ import annotations

import itertools

import pytest
import torch

from fewbit_fx.codec.bitplanes import from_memory_order, in_memory_order, memory_order


@pytest.mark.parametrize("sizes", [(3, 4, 5), (3, 1, 5), (1, 4, 1)])
@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
@pytest.mark.parametrize("expanded", [(), (0,), (1,), (2,), (0, 2)])
def test_strides_are_those_that_pointwise_operations_give(
    sizes: tuple[int, ...], order: tuple[int, ...], expanded: tuple[int, ...]
) -> None:
    """Readers view what is decoded as they view what is computed, whatever is permuted or expanded."""
    kept = [1 if d in expanded else n for d, n in enumerate(sizes)]
    x = torch.randn([kept[d] for d in order]).permute([order.index(d) for d in range(3)])
    x = x.expand([7 if d in expanded else n for d, n in enumerate(kept)])
    found = memory_order(x)
    again = from_memory_order(in_memory_order(x, found).reshape(-1), x.shape, found)
    assert torch.equal(again, x)
    told = [d for d, n in enumerate(x.shape) if n > 1]  # strides of one element say nothing
    assert [again.sigmoid().stride(d) for d in told] == [x.sigmoid().stride(d) for d in told]
