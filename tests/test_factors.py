"""Gradients and factors of all dtypes: what is no product of real numbers stays as it is, the rest is coded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT, CodedActivation, close_to_oracle, watch
from test_sites import Builder, tanh_backward
from torch import Tensor, nn

from fewbit_fx.passes.graph import aten, prims
from fewbit_fx.passes.sites import DerivativeSite, MaskSite
from fewbit_fx.reporting.words import action

Activation = Callable[[Tensor], Tensor]
FROZEN = torch.randn(64, 64) / 8
TARGET = torch.arange(64)
GRAPH = torch.randint(0, 64, (64, 64))

# Each takes the activation, which is to be coded, its input, and a second tensor.
BESIDE: dict[str, tuple[Callable[[Activation, Tensor, Tensor], Tensor], Tensor]] = {
    "loss / integer": (lambda f, x, n: F.linear(f(x), FROZEN).square().sum() / n, torch.tensor(64)),
    "sum / mask.sum()": (lambda f, x, m: (F.linear(f(x), FROZEN) * m).sum() / m.sum(), torch.rand(64, 64) > 0.2),
    "sum / count": (lambda f, x, n: F.linear(f(x), FROZEN).square().sum(0).div(n.clamp(min=1)).sum(), TARGET),
    "uint8 mask": (lambda f, x, m: F.linear(f(x), FROZEN).square() * m, torch.ones(64, 64, dtype=torch.uint8)),
    "int64 attention mask": (
        lambda f, x, m: (F.cross_entropy(F.linear(f(x), FROZEN), TARGET, reduction="none") * m).sum() / m.sum(),
        torch.randint(0, 2, (64,)),
    ),
    "boolean keep": (
        lambda f, x, m: (F.cross_entropy(F.linear(f(x), FROZEN), TARGET, reduction="none") * m).sum() / m.sum(),
        torch.rand(64) > 0.5,
    ),
    "full integer factor": (lambda f, x, n: F.linear(f(x), FROZEN) * n * (n > 0), torch.randint(0, 3, (64, 64))),
    "label smoothing": (lambda f, x, _: F.cross_entropy(F.linear(f(x), FROZEN), TARGET, label_smoothing=0.1), TARGET),
    "maximum": (lambda f, x, _: F.linear(f(x), FROZEN).max(), TARGET),
    "median": (lambda f, x, _: F.linear(f(x), FROZEN).median(), TARGET),
    "complex weight": (
        lambda f, x, z: torch.fft.irfft(torch.fft.rfft(F.linear(f(x), FROZEN)) * z, n=64),
        torch.randn(64, 33, dtype=torch.cfloat),
    ),
    "complex modulus": (lambda f, x, z: (F.linear(f(x), FROZEN) * z).abs(), torch.randn(64, 64, dtype=torch.cfloat)),
    "complex function of a real": (
        lambda f, x, y: torch.view_as_real(torch.polar(F.linear(f(x), FROZEN), y)).sum(-1),
        torch.randn(64, 64),
    ),
    "gathered": (lambda f, x, i: F.linear(f(x), FROZEN).square().gather(1, i), GRAPH),
}


@pytest.mark.parametrize("name", BESIDE)
def test_the_activation_beside_is_coded_and_its_gradient_the_oracles(name: str) -> None:
    function, other = BESIDE[name]
    x = torch.randn(64, 64, requires_grad=True)
    seen = watch(lambda x, other: function(F.gelu, x @ FROZEN, other), x, other)
    (gelu,) = seen.happened("gelu")
    assert action(gelu) == "coded in 3 bits"
    assert seen.record.fewbit_bytes < seen.record.plain_bytes
    assert not seen.record.note
    direction = torch.linspace(0.5, 1, max(1, seen.output.numel())).view(seen.output.shape)
    (found,) = torch.autograd.grad(seen.output, x, direction)

    def oracle(h: Tensor) -> Tensor:
        return CodedActivation.apply(h, F.gelu, gelu.levels)  # type: ignore[no-any-return]

    (expected,) = torch.autograd.grad(function(oracle, x @ FROZEN, other), x, direction)
    assert close_to_oracle([found], [expected])


COMPLEX: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "divided by 1 + x^2": lambda z, x: z / (1 + (2 * x) ** 2),
    "times tanh": lambda z, x: z * torch.tanh(2 * x),
    "times sigmoid, scaled": lambda z, x: 3 * (z * torch.sigmoid(x * 2)) / 2,
    "where": lambda z, x: torch.where(x > 0, z * torch.tanh(x), 0),
    "modulus": lambda z, x: (z * torch.tanh(x)).abs(),
    "conjugate": lambda z, x: (z * torch.tanh(x)).conj() * z,
    "double complex": lambda z, x: z.to(torch.cdouble) * torch.tanh(x).double(),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_a_complex_gradient_keeps_its_imaginary_part(name: str) -> None:
    z = torch.randn(64, 64, dtype=torch.cfloat, requires_grad=True)
    x = torch.randn(64, 64)
    y = COMPLEX[name](z, x)
    direction = torch.randn(64, 64, dtype=y.dtype)
    (expected,) = torch.autograd.grad(y, z, direction)
    seen = watch(COMPLEX[name], z, x)
    (found,) = torch.autograd.grad(seen.output, z, direction)
    torch.testing.assert_close(found, expected)
    assert float(found.imag.norm()) > 0


def test_a_region_without_a_source_swallows_no_mask() -> None:
    """The walk back from an integer factor ends nowhere; a dropout mask on its way is still packed."""

    def run(x: Tensor, n: Tensor) -> Tensor:
        return F.linear(F.dropout(F.gelu(x * 2), 0.3), FROZEN) * n

    seen = watch(run, torch.randn(64, 64, requires_grad=True), torch.randint(1, 3, (64, 64)))
    assert sorted(s.function for s in seen.coded) == ["custom", "dropout"]


def test_integer_and_complex_factors_are_no_sites() -> None:
    b = Builder()
    n = b.input("primals_2", torch.ones(4, 8, dtype=torch.int64))
    z = b.input("primals_3", torch.ones(4, 8, dtype=torch.cfloat))
    by_integer = b.call(aten.div.Tensor, b.g, n)
    by_complex = b.call(aten.mul.Tensor, b.g, z)
    assert b.sites(by_integer, by_complex) == []


def test_a_function_of_an_integer_made_real_is_a_site_of_that() -> None:
    b = Builder()
    n = b.input("primals_2", torch.ones(4, 8, dtype=torch.int64))
    real = b.call(prims.convert_element_type.default, n, torch.float32)
    _, gx = tanh_backward(b, real, b.g)
    (site,) = b.sites(gx)
    assert isinstance(site, DerivativeSite)
    assert site.source is real


# Conversions that round a gradient on purpose.


class Rounded(torch.autograd.Function):
    """Rounds the gradient, as a recipe of low-precision training does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g.to(ctx.dtype).to(g.dtype), None


ROUNDINGS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "before the activation": lambda x, d: F.linear(F.gelu(Rounded.apply(x * 1, d)), FROZEN),
    "scaled": lambda x, d: F.linear(F.gelu(Rounded.apply(x * 2, d)), FROZEN),
    "two activations": lambda x, d: F.linear(F.gelu(Rounded.apply(torch.tanh(x * 1), d)), FROZEN),
    "before a mask": lambda x, d: F.linear(F.relu(Rounded.apply(x * 1, d)), FROZEN),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_rounding_on_purpose_stays(name: str, dtype: torch.dtype) -> None:
    """It stands as often in the coded backward; where nothing comes after it, it shows in the gradient.

    Of a rounding to bfloat16 or float16 that is undone at once, torch 2.11 itself leaves nothing.
    """
    x = torch.randn(64, 64, requires_grad=True)
    seen = watch(ROUNDINGS[name], x, dtype)
    assert seen.coded

    def roundings(graph_module: torch.fx.GraphModule) -> int:
        return sum(
            n.target is prims.convert_element_type.default and n.args[1] == dtype for n in graph_module.graph.nodes
        )

    expected = roundings(seen.plain.backward)
    assert roundings(seen.chosen.backward) == expected
    assert expected == 1 or dtype.itemsize == 2
    if "before" in name and expected:
        (g,) = torch.autograd.grad(seen.output.square().sum(), x)
        assert torch.equal(g, g.to(dtype).float())


def test_a_decompositions_own_rounding_does_not_split_a_function() -> None:
    """x * erf(softplus(x)) in bfloat16: each operation of it returns to bfloat16, and the derivative is one."""
    x = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    frozen = FROZEN.bfloat16()
    seen = watch(lambda x: F.linear(x * torch.erf(F.softplus(x * 2)), frozen), x, config=STRICT)
    assert [action(s) for s in seen.record.sites] == ["coded in 3 bits"]


def test_masks_of_integers_are_packed() -> None:
    seen = watch(lambda x, n: F.linear(torch.where(n > 3, x, 0.0), FROZEN), nn.Parameter(torch.randn(64, 64)), GRAPH)
    assert [type(s) for s in seen.sites] == [MaskSite]
    assert [action(s) for s in seen.coded] == ["exact one-bit mask"]
