"""Packing of codes: any codes come back, as bytes and as planes, in exactly as many bits."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit_fx.codec.packing import blocks_per_group, pack, tensors_of_codes, unpack

CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("as_bytes", [True, False], ids=["bytes", "words"])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), groups=st.integers(0, 3))
def test_codes_come_back(bits: int, as_bytes: bool, seed: int, groups: int) -> None:
    with mock.patch("fewbit_fx.codec.packing.packs_bytes", return_value=as_bytes):
        shape = groups, blocks_per_group(bits, CPU), 32
        torch.manual_seed(seed)
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).float()
        packed = pack(codes, bits)
        placed = None if as_bytes else lambda blocks: blocks.reshape(shape)
        assert torch.equal(unpack(packed, bits, placed=placed), codes)
        assert torch.equal(unpack(packed, bits, 0.5, placed), codes + 0.5)
        assert sum(t.numel() * t.element_size() for t in packed) * 8 == codes.numel() * bits
        assert len(packed) == tensors_of_codes(bits)
