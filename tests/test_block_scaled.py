"""Codes of values: their error, what is exact, what is not finite, and any shape, stride and dtype."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.offline_triton import gpu_layout
from fewbit_fx.codec.block_scaled import block_layout, decode_values, encode_values, scale_nbytes
from fewbit_fx.codec.shares import DIGITS, random_shares_of, shares_of, unit_of
from fewbit_fx.config import MIN_VALUE_BITS
from fewbit_fx.passes.representations.value_codes import SHARES_ERROR, STOCHASTIC_SHARES_ERROR

BITS = range(MIN_VALUE_BITS, 9)


def round_trip(x: Tensor, bits: int) -> Tensor:
    layout = block_layout(x, bits)
    return decode_values(encode_values(x, bits, layout), bits, layout, x)


def relative_error(x: Tensor, bits: int) -> float:
    return float((round_trip(x, bits).double() - x.double()).norm() / x.double().norm())


@pytest.mark.parametrize(("bits", "most"), [(8, 0.0055), (6, 0.0206), (5, 0.0433), (4, 0.0919), (3, 0.204)])
def test_the_error_of_a_normal_tensor(bits: int, most: float) -> None:
    """At most a hundredth above what it is where codes are found with a root, by the formula of the module's text."""
    assert relative_error(torch.randn(1024, 1024), bits) <= most


@pytest.mark.parametrize(("bits", "most"), [(6, 0.0247), (4, 0.113)])
def test_the_error_of_a_tensor_with_heavy_tails(bits: int, most: float) -> None:
    x = torch.distributions.StudentT(4.0).sample((1024, 1024))
    assert relative_error(x, bits) <= most


def test_half_a_bit_of_scales() -> None:
    x = torch.randn(1024, 64)
    assert scale_nbytes(x, block_layout(x, 4)) * 8 == x.numel() // 2
    saved = encode_values(x, 4, block_layout(x, 4))
    assert sum(t.numel() * t.element_size() for t in saved) * 8 == int(4.5 * x.numel())


@settings(deadline=None, max_examples=100)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    reordered=st.booleans(),
    bits=st.sampled_from(BITS),
    shares=st.booleans(),
    stochastic=st.booleans(),
)
def test_a_gpu_decodes_what_a_cpu_does(
    shape: list[int], reordered: bool, bits: int, shares: bool, stochastic: bool
) -> None:
    """One goes through the elements as the tensor has them, the other block by block."""
    x = torch.rand(shape)
    if reordered and shape:
        x = x.movedim(0, -1)
    decoded = []
    for layout in (contextlib.nullcontext, gpu_layout):
        with layout():
            blocks = block_layout(x, bits)
            codes = encode_values(x, bits, blocks, shares=shares)
            decoded.append(decode_values(codes, bits, blocks, x, stochastic, shares))
    by_cpu, by_gpu = decoded
    assert torch.equal(by_gpu, by_cpu)
    # Strides of an empty tensor mean nothing, and no site is one.
    assert not x.numel() or by_gpu.stride() == by_cpu.stride()


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_zeros_and_signs_are_exact(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 40), min_size=0, max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = (torch.randn(shape) * (torch.rand(shape) > 0.3)).to(dtype)
    if x.dim() > 1 and data.draw(st.booleans()):
        x = x.transpose(0, 1)
    decoded = round_trip(x, data.draw(st.sampled_from(BITS)))
    assert decoded.shape == x.shape
    assert decoded.dtype == x.dtype
    assert torch.equal(decoded.sign(), x.sign())


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e4, 1e30])
def test_the_error_does_not_depend_on_the_scale(scale: float) -> None:
    x = torch.randn(64, 1024)
    assert relative_error(x * scale, 6) == pytest.approx(relative_error(x, 6), rel=0.02)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bits: int, value: float) -> None:
    x = torch.randn(64, 64)
    x[3, 5] = value
    x[3, 6] = 0
    decoded = round_trip(x, bits)
    assert not decoded[3, 5].isfinite()
    assert decoded[3, 5].sign().equal(x[3, 5].sign()) or value != value
    assert int((~decoded.isfinite()).sum()) <= 32, "its block alone"
    assert decoded[3, 6] == 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", [contextlib.nullcontext, gpu_layout], ids=["cpu", "gpu"])
@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_signs_beside_an_infinity(
    bits: int, layout: Callable[[], AbstractContextManager[None]], infinity: float
) -> None:
    """All of the block is infinite, of its own sign."""
    x = torch.tensor([infinity, *(sign * 10.0**-n for n in range(1, 16) for sign in (1, -1)), 0.0])
    with layout():
        assert torch.equal(round_trip(x, bits), torch.where(x == 0, 0.0, x.sign() * math.inf))


@pytest.mark.parametrize("bits", BITS)
def test_masks_where_a_cpu_flushes_subnormal_numbers(bits: int) -> None:
    lowest = torch.where(torch.rand(64, 64) > 0.5, 0.0, torch.finfo(torch.float32).min)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no mode in which it flushes them")
    try:
        decoded = round_trip(lowest, bits)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(decoded.sign(), lowest.sign())
    assert (decoded[lowest < 0] <= 0.5 * torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masks_of_attention(bits: int, dtype: torch.dtype) -> None:
    """What is added to scores: 0, and minus infinity or the lowest number."""
    kept = torch.rand(64, 64) > 0.5
    infinite = torch.where(kept, 0.0, -math.inf).to(dtype)
    assert torch.equal(round_trip(infinite, bits), infinite)
    lowest = torch.where(kept, 0.0, torch.finfo(dtype).min).to(dtype)
    decoded = round_trip(lowest, bits)
    assert torch.equal(decoded == 0, kept)
    assert (decoded[~kept] <= 0.5 * torch.finfo(dtype).min).all()
    assert decoded.isfinite().all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_largest_element_leaves_its_interval(bits: int, dtype: torch.dtype) -> None:
    """The scale's rounding moves it by up to 1 in 256; what is finite is decoded to what is finite."""
    largest = torch.linspace(1, 2, 4097).to(dtype).unsqueeze(-1)
    x = torch.cat([largest, -largest, largest.expand(-1, 30) * torch.rand(30).to(dtype)], -1)
    decoded = round_trip(x, bits)
    widest = {2: 0.6, 3: 0.22, 4: 0.1, 5: 0.05, 6: 0.025, 7: 0.008, 8: 0.006}[bits]
    error = (decoded.double() - x.double()).abs() / largest.double()
    assert (error <= widest + torch.finfo(dtype).eps / 2).all()
    scaled = (x / 2).to(torch.float64) * torch.finfo(dtype).max
    assert round_trip(scaled.to(dtype), bits).isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_more_bits_are_less_error(bits: int) -> None:
    x = torch.randn(64, 1024)
    assert bits == MIN_VALUE_BITS or relative_error(x, bits) < relative_error(x, bits - 1)


def decoded_shares(x: Tensor, bits: int, seed: Tensor | None = None) -> Tensor:
    layout = block_layout(x, bits)
    codes = encode_values(x, bits, layout, seed, shares=True)
    return decode_values(codes, bits, layout, x, stochastic=seed is not None, shares=True)


@pytest.mark.parametrize("at_random", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_shares_are_off_by_a_part_of_themselves(bits: int, at_random: bool) -> None:
    """Half a step between floating-point numbers, or a whole one; below the least level at most that level."""
    rows = (torch.randn(4097, 1024) * 5).softmax(-1)
    x = torch.cat([rows, torch.linspace(0.5, 1, 4097).unsqueeze(-1).expand(-1, 32)], -1)
    decoded = decoded_shares(x, bits, torch.tensor(7) if at_random else None)
    step, last = 2.0 ** -DIGITS[bits], torch.tensor(2.0 ** (bits - 1) - 2)
    no_offset = torch.zeros((), dtype=torch.int32)
    least = 1.01 * (random_shares_of(last, bits) if at_random else shares_of(last, bits, no_offset))
    largest = x.view(4097, -1, 32).amax(-1, keepdim=True).expand(-1, -1, 32).reshape(x.shape)
    bound = torch.maximum(x * step * (1 if at_random else 0.5), largest * least)
    assert ((decoded - x).abs() <= bound + x * 2**-7).all()  # a little for the scale's rounding
    assert (decoded >= 0).all()


@pytest.mark.parametrize("bits", BITS)
@settings(deadline=None, max_examples=20)
@given(share=st.floats(0.51, 0.99))
def test_shares_that_are_alike_are_off_evenly(bits: int, share: float) -> None:
    """As the probability of a class that a model predicts alike for every token, whatever it is.

    The bits of its float32 are then off evenly, by half of a unit in either direction, but no more than the largest is.
    """
    blocks, unit = 4096, unit_of(bits)
    x = torch.full((blocks, 32), share)
    x[:, 7] = 1
    decoded = decoded_shares(x, bits).double()
    scale = 1 - 2**-8
    offset = torch.arange(-unit // 2, unit // 2, unit // 1024, dtype=torch.int32)
    off = ((torch.tensor(share) / scale).view(torch.int32) + offset).view(torch.float32).clamp_max(1 + 2**-8)
    expected, deviation = float(off.double().mean()) * scale, float(off.double().std()) * scale
    most = 5 * deviation / math.sqrt(1021)  # so many numbers are different
    for lane in (0, 31):
        assert float(decoded[:, lane].mean()) == pytest.approx(expected, abs=most)
        assert float(decoded[:, lane].std()) == pytest.approx(deviation, rel=0.1)
    if bits == 8:  # near 1/2 and 1 an eighth of a step, and what scatter leaves
        assert float(decoded[:, 0].mean()) == pytest.approx(share, abs=0.17 / 32)
    assert torch.equal(decoded[:, 7], decoded[:1, 7].expand(blocks))
    assert decoded[0, 7] == pytest.approx(1, rel=2**-8)


@pytest.mark.parametrize("bits", BITS)
def test_the_predicted_error_of_shares(bits: int) -> None:
    x = torch.randn(2048, 1024).softmax(-1)
    for seed, predicted in ((None, SHARES_ERROR), (torch.tensor(3), STOCHASTIC_SHARES_ERROR)):
        found = (decoded_shares(x, bits, seed) - x).norm() / x.norm()
        assert found == pytest.approx(predicted[bits], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_shares_that_are_0_or_not_finite(bits: int, dtype: torch.dtype) -> None:
    x = torch.rand(4, 64).to(dtype)
    x[:, ::3] = 0
    x[0, 1], x[1, 1], x[2, 1], x[3, 1] = math.nan, -math.nan, math.inf, torch.finfo(dtype).max
    for seed in (None, torch.tensor(1)):
        decoded = decoded_shares(x, bits, seed)
        assert torch.equal(decoded[:, ::3], x[:, ::3])
        assert decoded[:2, 1].isnan().all()
        assert decoded[2, 1] == math.inf
        assert decoded[3].isfinite().all()
        assert decoded[:, 32:].isfinite().all()
