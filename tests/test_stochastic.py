"""Stochastic rounding: no bias, no generator, and seeds that are the same or differ where they should."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from helpers import derivative, gradients, mlp, watch
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx.codec.bitplanes import plane_layout
from fewbit_fx.codec.block_scaled import block_layout, decode_values, encode_values
from fewbit_fx.codec.dither import fixed, rounding_seed, uniform
from fewbit_fx.codec.scheme import stochastic_scheme
from fewbit_fx.codec.shares import random_shares_of
from fewbit_fx.codec.stochastic_levels import StochasticScheme
from fewbit_fx.config import FewBitConfig
from fewbit_fx.passes.representations.value_codes import STOCHASTIC_ERROR

SEEDS = 1000
LEAN = FewBitConfig(recipe="lean", rounding="stochastic", strict=True, min_numel=0)


# As improbable, for any of all elements, as 4 standard errors are for a normally distributed number (Bonferroni).
ALPHA = 2 * NormalDist().cdf(-4.0)


def check_roundings(found: Tensor, exact: Tensor, below: Tensor, above: Tensor) -> None:
    """Each element is one of two numbers, and the mean over seeds is the exact one.

    By Bernstein's inequality, which also bounds rare choices, where 4 standard errors of 1,000 seeds do not.

    Args:
        found: One row for each seed.
        exact: What their mean is to be.
        below, above: The two numbers.
    """
    step, rounding = above - below, 1e-6 * exact.abs().max()
    assert ((found - below).abs().minimum((found - above).abs()) <= rounding).all()
    logarithm = math.log(2 * exact.numel() / ALPHA)
    linear = step * logarithm / (3 * len(found))
    bound = linear + (linear.square() + 2 * (exact - below) * (above - exact) * logarithm / len(found)).sqrt()
    assert ((found.mean(0) - exact).abs() <= bound + rounding).all()
    assert ((found != found[0]).any(0) | ((exact - below) * (above - exact) < 0.05 * step.square())).all()


def check_means(found: Tensor, exact: Tensor) -> None:
    """Means over seeds, of what is a sum of many roundings, are within 4 standard errors (Bonferroni)."""
    bound = -NormalDist().inv_cdf(ALPHA / exact.numel() / 2)
    error = found.std(0) / math.sqrt(len(found))
    assert (error > 0).all()
    assert ((found.mean(0) - exact).abs() <= bound * error + 1e-6 * exact.abs().max()).all()


def array_derivative(function: Callable[[Tensor], Tensor]) -> Callable:
    def slope(x):  # type: ignore[no-untyped-def]
        with torch.enable_grad():
            return derivative(function, torch.from_numpy(x.copy())).numpy()

    return slope


def on_tensors(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return derivative(function, x).float()

    return slope


def test_numbers_are_uniform_and_independent() -> None:
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    numbers = uniform(rounding_seed(x.device), x, x)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 64, 0, 1)
    expected = x.numel() / 64
    assert ((counts - expected).square() / expected).sum() < 63 + 5 * math.sqrt(2 * 63)  # chi-squared
    for rows, columns in ((0, 1), (1, 0), (1, 1), (0, 32), (32, 0), (7, 100)):
        a, b = numbers[: 64 - rows, : 1024 - columns], numbers[rows:, columns:]
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert correlation.abs() < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("unit", [2**19, 2**21, 2**23])
def test_numbers_of_places_are_as_if_at_random(unit: int) -> None:
    """Also those of places every so far apart, as of one class in the logits of many tokens."""
    blocks = 2**15
    numbers = fixed(torch.empty(blocks, 32), unit)
    assert torch.equal(numbers, fixed(torch.empty(16, blocks // 16, 32), unit).view(numbers.shape))
    assert torch.equal(numbers[100:], fixed(torch.empty(blocks - 100, 32), unit, before=100))
    assert torch.equal(numbers[:100], fixed(torch.empty(100, 32), unit))
    assert 0 <= numbers.min() <= numbers.max() < unit
    assert numbers.double().mean() / unit == pytest.approx(0.5, abs=0.01)
    turns = torch.polar(torch.ones(numbers.numel()), numbers.flatten() * (2 * math.pi / unit))
    means = torch.stack([turns[: 256 * distance : distance].mean().abs() for distance in range(128, 4096)])
    assert means.square().mean() < 1.2 / 256  # of directions at random 1 / 256; were all alike, 1
    assert means.max() < 0.6


@pytest.mark.one_in(3)
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_decoded_values_are_right_on_average(bits: int, shares: bool) -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[1, :64], x[2, 5] = 30.0, 0.0, 1e-4
    x = x.softmax(-1) if shares else x
    layout, decoded = block_layout(x, bits), []
    for seed in range(SEEDS):
        codes = encode_values(x, bits, layout, torch.tensor(seed), shares)
        decoded.append(decode_values(codes, bits, layout, x, stochastic=True, shares=shares))
    found = torch.stack(decoded).double()
    # A scale of 32 neighbours, as it is stored; the places of values as the modules have them.
    scale = codes[-1].double().reshape(-1).repeat_interleave(32).view(x.shape)
    if shares:
        unit = scale / (1 - 2**-8) ** 2
        levels = random_shares_of(torch.arange(2.0**bits - 1) - 2.0 ** (bits - 1), bits).double()
        levels = torch.cat([levels, torch.zeros(1)])
        place = (x.double() / unit).clamp_max(1)
        i = (levels.flip(0) <= place.unsqueeze(-1)).sum(-1) - 1
        below, above = levels.flip(0)[i], levels.flip(0)[(i + 1).clamp_max(len(levels) - 1)]
    else:
        reach = (2.0 ** (bits - 1) - 1.5) * (1 - 2**-7) * (1 - 2**-8)
        place, unit = x.double().abs() * reach / scale, scale / reach * torch.where(x < 0, -1.0, 1.0)
        below = torch.where(place < 0.5, 0.0, (place - 0.5).floor() + 0.5)
        above = torch.where(place < 0.5, 0.5, below + 1)
    ends = torch.stack([below * unit, above * unit])
    check_roundings(found, x.double(), ends.amin(0), ends.amax(0))
    assert not found[:, x == 0].any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_error_is_the_predicted_one(bits: int) -> None:
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    layout = block_layout(x, bits)
    codes = encode_values(x, bits, layout, seed=torch.tensor(0))
    decoded = decode_values(codes, bits, layout, x, stochastic=True)
    assert (decoded - x).norm() / x.norm() == pytest.approx(STOCHASTIC_ERROR[bits], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_finite_stays_finite_and_what_is_not_does_not(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    x = torch.ones(2, 128, dtype=dtype)
    x[0, :64:3], x[0, 1:64:3] = limits.min, limits.max
    x[1, 0], x[1, 32], x[1, 64] = float("inf"), float("nan"), 0.0
    for bits in (2, 4, 8):
        layout = block_layout(x, bits)
        decoded = decode_values(encode_values(x, bits, layout, seed=torch.tensor(1)), bits, layout, x, stochastic=True)
        assert decoded[0].isfinite().all()
        assert decoded[1, 0].isinf()
        assert decoded[1, 32].isnan()


@pytest.mark.one_in(10)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("function", [F.gelu, F.silu, torch.tanh, F.elu, torch.sin], ids=lambda f: f.__name__)
def test_decoded_derivatives_are_right_on_average(function: Callable[[Tensor], Tensor], bits: int) -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[0, 1], x[1] = 30.0, -30.0, 0.01 * x[1]  # the sample may have none of them
    scheme = stochastic_scheme(array_derivative(function), bits)
    assert isinstance(scheme, StochasticScheme)
    slope, layout, ones = on_tensors(function), plane_layout(x), torch.ones_like(x)
    decoded = [
        scheme.decode(ones, scheme.encode(x, slope, layout, torch.tensor(seed)), layout, torch.float32)
        for seed in range(SEEDS)
    ]
    exact, levels = slope(x).double(), scheme.fit(x, slope).double()
    above = torch.bucketize(exact, levels).clamp(1, len(levels) - 1)
    check_roundings(torch.stack(decoded).double(), exact, levels[above - 1], levels[above])


def test_derivatives_that_are_exact_are_not_rounded() -> None:
    assert not stochastic_scheme(array_derivative(F.relu), 1).seeded


def test_several_inputs_of_a_graph_are_rounded_with_one_seed() -> None:
    """The seed is made before the first of their codes, whichever that is."""
    x, y = (torch.randn(8, 64, requires_grad=True) for _ in range(2))
    config = FewBitConfig(recipe="derivatives", rounding="stochastic", strict=True, min_numel=0)
    seen = watch(lambda x, y: F.gelu(x) + F.silu(y), x, y, config=config)
    assert len(seen.coded) == 2
    assert str([n.target for n in seen.chosen.forward.graph.nodes]).count("rounding_seed") == 1


def test_the_gradient_of_linear_layers_is_right_on_average() -> None:
    """Through the whole of the passes, for what is linear in what is coded: a weight's gradient, and f' of a GELU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32).requires_grad_(False), *mlp(nn.GELU(), frozen=True))
    x = torch.randn(64, 32)
    seen = watch(model, x, config=LEAN)
    assert {(s.form, s.function) for s in seen.coded} == {("codes", "gelu"), ("values", "linear input")}
    exact = gradients(model, model(x).sum())
    found: list[list[Tensor]] = []
    run = compiled(model, rounding="stochastic")
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        found.append(gradients(model, run(x).sum()))
    for position, gradient in enumerate(exact):
        check_means(torch.stack([f[position] for f in found]).double(), gradient.double())


def compiled(model: nn.Module, **options: object) -> nn.Module:
    torch.compiler.reset()
    backend = fewbit_fx.backend(recipe="lean", strict=True, min_numel=0, **options)
    return torch.compile(model, backend=backend, dynamic=False)  # type: ignore[return-value]


def test_seeds_and_the_forward_with_dropout() -> None:
    model, x = mlp(nn.Sequential(nn.GELU(), nn.Dropout(0.3))), torch.randn(64, 32)

    def step(run: nn.Module, seed: int | None, x: Tensor = x) -> tuple[Tensor, list[Tensor], Tensor]:
        if seed is not None:
            torch.manual_seed(seed)
        y = run(x)
        return y, gradients(model, y.square().sum()), torch.get_rng_state()

    nearest = compiled(model)
    y, _, state = step(nearest, 1)
    stochastic = compiled(model, rounding="stochastic")
    first, again = step(stochastic, 1), step(stochastic, 1)
    assert torch.equal(first[0], y)  # the same masks of dropout
    assert torch.equal(first[2], state)  # and of the next step
    assert all(map(torch.equal, first[1], again[1]))
    plain = compiled(mlp(nn.GELU()), rounding="stochastic")
    model = plain._orig_mod
    (one,), (other,), (moved,) = (step(plain, seed, at)[1][:1] for seed, at in ((1, x), (2, x), (1, x + 1e-6)))
    assert not torch.equal(one, other)  # by the seed
    assert (one - moved).norm() > 10 * 1e-6 * one.norm()  # by the data, which change from step to step


def test_ranks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    seeds = set()
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        seeds.add(rounding_seed(torch.device("cpu")).item())
    assert len(seeds) == 4


def test_a_decision_is_not_left_to_chance() -> None:
    """ReLU's mask, which exact signs would tell: it is saved where the backward would read it off a rounded value."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.down = nn.LayerNorm(64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 2
            return self.down(F.relu(h)) + self.norm(h).sum(-1, keepdim=True)

    x = torch.randn(32, 64, requires_grad=True)
    seen = watch(Twice(), x, config=LEAN)
    assert any(site.form == "mask" for site in seen.coded)
