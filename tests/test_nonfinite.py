"""NaN and infinities in x: the gradient is not finite where the exact one is not, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from helpers import STRICT, watch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_activations import CASES, PLAIN, Lambda, Network
from test_drop_ins import MODULES, pair
from torch import Tensor, nn

import fewbit_fx
import fewbit_fx.functional
import fewbit_fx.nn
from fewbit_fx import FewBitConfig
from fewbit_fx.codebooks.activations import ACTIVATIONS, derivative_of
from fewbit_fx.codebooks.fitting import bits_for
from fewbit_fx.codec.bitplanes import PlaneLayout
from fewbit_fx.codec.encode_decode import bits_by_value, decode_and_multiply, encode
from fewbit_fx.codec.nonfinite import MARK, Undefined, find_undefined, is_finite
from fewbit_fx.codec.scheme import fit_scheme

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture
def eager_kernels() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def poisoned(x: Tensor) -> Tensor:
    """x with bad numbers at a few places, NaN of both signs among them."""
    flat = x.clone().view(-1)
    places = torch.randperm(flat.numel())[: max(1, flat.numel() // 300)]
    values = torch.tensor([*BAD, -BAD[0]], dtype=x.dtype)
    flat[places] = values[torch.arange(len(places)) % 4]
    return flat.view(x.shape)


def check(found: Tensor, clean: Tensor, exact: Tensor, x: Tensor) -> None:
    """Not finite just where the exact gradient is not, and elsewhere changed at most in words with bad numbers."""
    assert torch.equal(found.isfinite(), exact.isfinite())
    assert (found != clean).sum() <= 32 * (~x.isfinite()).sum()


# The backend, in plain ATen.


class Activated(nn.Module):
    """An activation in the middle of a graph: its gradient does not come straight from outside."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = copy.deepcopy(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * 1).flip(0) * 3


def through_the_backend(module: nn.Module, x: Tensor, config: FewBitConfig) -> Tensor:
    x = x.clone().requires_grad_()
    seen = watch(module, x, config=config)
    if config is not PLAIN:
        assert seen.coded
    (gradient,) = torch.autograd.grad(seen.output, x, torch.ones_like(seen.output))
    return gradient


@pytest.mark.one_in(24)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_backend(name: str, dtype: torch.dtype) -> None:
    module = Activated(CASES[name].module).to(dtype)
    x = (2 * torch.randn(33, 301)).to(dtype)
    bad = poisoned(x)
    exact = through_the_backend(module, bad, PLAIN)
    found, clean = (through_the_backend(module, v, STRICT) for v in (bad, x))
    check(found, clean, exact, bad)


@pytest.mark.one_in(16)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.t(), lambda x: x[:, ::3], lambda x: x[:2]])
def test_backend_bits_and_layouts(make: Callable[[Tensor], Tensor], bits: int) -> None:
    module, config = (
        Activated(nn.GELU()),
        FewBitConfig(recipe="derivatives", strict=True, min_numel=0, bits=bits, max_relative_error=9.0),
    )
    x = torch.randn(40, 129)
    bad = poisoned(x)
    exact, found, clean = (
        through_the_backend(module, make(v), c) for v, c in ((bad, PLAIN), (bad, config), (x, config))
    )
    if bits > 1:
        check(found, clean, exact, make(bad))
    assert (found.isfinite() <= exact.isfinite()).all()
    assert (found != clean).sum() <= 32 * (~make(bad).isfinite()).sum()


def test_no_more_is_saved() -> None:
    seen = watch(Network(nn.GELU()), torch.randn(64, 32), config=STRICT)
    (site,) = seen.record.sites
    assert site.bytes_after == 64 * 256 * 3 // 8


# The drop-ins, with levels that do not hang on x. Those that do: test_drop_ins_sampled.py.


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("eager_kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_drop_ins(name: str, dtype: torch.dtype) -> None:
    ours, torchs = (module.to(dtype) for module in pair(name, levels="typical"))
    x = (2 * torch.randn(64, 256)).to(dtype)
    bad = poisoned(x)
    found, clean, exact = (_gradient(m, v) for m, v in ((ours, bad), (ours, x), (torchs, bad)))
    check(found, clean, exact, bad)


@pytest.mark.one_in(8)
@pytest.mark.usefixtures("eager_kernels")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (31,), (2050,), (33, 77)], ids=str)
@pytest.mark.parametrize("name", ["GELU", "Tanh", "SiLU"])
def test_drop_ins_bits_and_sizes(name: str, shape: tuple[int, ...], bits: int) -> None:
    ours, torchs = pair(name, bits, levels="typical")
    x = torch.randn(shape)
    bad = poisoned(x)
    found, clean, exact = (_gradient(m, v) for m, v in ((ours, bad), (ours, x), (torchs, bad)))
    if bits > 1:
        check(found, clean, exact, bad)
    assert (found.isfinite() <= exact.isfinite()).all()
    assert (found != clean).sum() <= 32 * (~bad.isfinite()).sum()


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    return gradient


# Compiled.


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled(dtype: torch.dtype) -> None:
    """Functions coded by the backend, from x and from f'(x), an exact mask, and a drop-in of one bit, in one graph."""
    functions = [CASES[n].module for n in ("GELU", "Tanh", "x + sin(x)^2", "ReLU")]
    one_bit = Lambda(lambda x: fewbit_fx.functional.sigmoid(x, bits=1, levels="typical"))

    def run(*xs: Tensor) -> Tensor:
        return torch.stack([f(x * 1) * 3 for f, x in zip([*functions, one_bit], xs, strict=True)])

    def gradients(function: Callable[..., Tensor], values: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [v.clone().requires_grad_() for v in values]
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    xs = [torch.randn(50, 130).to(dtype) for _ in (*functions, one_bit)]
    bad = [poisoned(x) for x in xs]
    compiled = torch.compile(run, backend=fewbit_fx.backend(recipe="derivatives", strict=True, min_numel=0))
    found, clean = gradients(compiled, bad), gradients(compiled, xs)
    for i, function in enumerate(functions):
        check(found[i], clean[i], _gradient(lambda x, f=function: f(x) * 3, bad[i]), bad[i])
    assert not found[-1][bad[-1].isnan()].isfinite().any()
    assert (found[-1] != clean[-1]).sum() <= 32 * (~bad[-1].isfinite()).sum()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_kernels_of_drop_ins(dtype: torch.dtype) -> None:
    ours, torchs = pair("GELU", levels="typical")
    x = torch.randn(3, 700, dtype=dtype)
    bad = poisoned(x)
    check(_gradient(ours, bad), _gradient(ours, x), _gradient(torchs, bad), bad)


@pytest.mark.usefixtures("eager_kernels")
def test_an_overflow_is_seen() -> None:
    """By clip_grad_norm_ and by GradScaler, which skips the step and lowers its scale."""
    model = nn.Sequential(nn.Linear(8, 64), fewbit_fx.nn.GELU(), nn.Linear(64, 1))
    x = torch.randn(16, 8)
    x[3, 2] = 3e38
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(x * 10)[:, 0].nan_to_num().sum()).backward()
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.nn.utils.clip_grad_norm_(model[0].parameters(), 1.0, error_if_nonfinite=True)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# The escape by itself.


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    bits=st.integers(1, 8),
    missing=st.integers(0, 2),
    lanes=st.sampled_from((1, 8, 32)),
    rate=st.sampled_from((0.0, 0.001, 0.05, 0.5, 1.0)),
    seed=st.integers(0, 1000),
)
def test_the_escape(shape: list[int], bits: int, missing: int, lanes: int, rate: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = tuple(i / 2**bits for i in range(max(2 ** (bits - 1) + 1, 2**bits - missing)))
    values = torch.rand(shape, generator=generator)
    bad = torch.rand(shape, generator=generator) < rate
    layout = PlaneLayout(lanes)
    found = _there_and_back(torch.where(bad, float("nan"), values), levels, layout)
    clean = decode_and_multiply(
        torch.ones(shape), encode(values, lambda v: bits_by_value(v, levels), layout), levels, layout, values.dtype
    )
    beside = _in_words_with(bad, layout)
    assert torch.equal(found[~beside], clean[~beside])
    assert torch.equal(found.isnan(), beside if bits == 1 else bad)
    assert set(found[~found.isnan()].tolist()) <= set(levels)


def _there_and_back(values: Tensor, levels: tuple[float, ...], layout: PlaneLayout) -> Tensor:
    planes = encode(values, lambda v: [*bits_by_value(v, levels), is_finite(v)], layout, guarded=True)
    assert len(planes) == bits_for(levels) * layout.parts(values)
    assert sum(p.nbytes for p in planes) == bits_for(levels) * layout.nbytes(values)
    return decode_and_multiply(torch.ones_like(values), planes, levels, layout, values.dtype, guarded=True)


def _in_words_with(bad: Tensor, layout: PlaneLayout) -> Tensor:
    """Which elements share a word with a bad one."""
    parts = [block.any(-2, keepdim=True).expand(block.shape) for block in layout.split(bad)]
    return layout.join(parts, bad)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("lanes", [1, 16])
def test_words_that_happen_to_be_the_mark(lanes: int, bits: int) -> None:
    """One element of each moves to the level beside its own, and no other changes."""
    levels = tuple(i / 2**bits for i in range(2**bits))
    spelled = torch.tensor([MARK >> i & 1 for i in range(32)], dtype=torch.bool)
    for prefix in range(2 ** (bits - 1)):
        low, high = sorted((2 * prefix, 2 * prefix + 1), key=lambda rank: (rank ^ rank >> 1) & 1)
        values = torch.where(spelled, levels[high], levels[low]).unsqueeze(-1).expand(32, lanes)
        for x in (values, torch.cat([values, torch.full((32, lanes), levels[0])])):
            found = _there_and_back(x, levels, PlaneLayout(lanes))
            changed = (found != x).nonzero()
            assert changed.tolist() == [[0, lane] for lane in range(lanes)]
            assert set(found[0].tolist()) == {levels[high], levels[low]} - {x[0, 0].item()}


def test_what_is_undefined_is_found() -> None:
    everywhere, at_nan = Undefined(True, True, True), Undefined(True, False, False)
    for name, expected in {"gelu": everywhere, "silu": everywhere, "tanh": at_nan, "elu": at_nan, "relu": None}.items():
        assert find_undefined(derivative_of(ACTIVATIONS[name])) == expected
    one_sided = find_undefined(lambda x: np.where(x > 0, x * np.exp(-x), 0.0))
    assert one_sided == Undefined(nan=False, positive=True, negative=False)

    def fails(x: object) -> object:
        raise ValueError

    assert find_undefined(fails) == everywhere  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", range(1, 8))
def test_where_it_is_undefined(which: int, dtype: torch.dtype) -> None:
    undefined = Undefined(*(bool(which >> i & 1) for i in range(3)))
    x = torch.tensor([*BAD, -BAD[0], 0.0, -0.0, 1e-45, torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    expected = [not undefined.nan, not undefined.positive, not undefined.negative, not undefined.nan, *[True] * 5]
    assert undefined.spares(x).tolist() == expected
    if dtype == torch.float32:
        spared = undefined.spares(x, signs=True)
        assert (spared if spared.dtype == torch.bool else spared < 0).tolist() == expected


def test_exact_one_bit_codes_need_no_guard() -> None:
    for name in ("relu", "leaky relu", "hardtanh", "relu6", "hardshrink", "hardsigmoid"):
        assert not fit_scheme(derivative_of(ACTIVATIONS[name]), 3).guarded
