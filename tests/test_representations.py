"""The extension point: a representation from outside, in one file, and what the protocol promises of our own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from helpers import STRICT, gradients, mlp, watch
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx import FewBitConfig
from fewbit_fx.passes.graph import value_of
from fewbit_fx.passes.representations import Decision, Decode, Encode, Representation
from fewbit_fx.passes.sites import DerivativeSite, Site
from fewbit_fx.reporting.words import action, because


@dataclass(frozen=True)
class ToHalf(Encode):
    def __call__(self, value: Tensor) -> list[Tensor]:
        return [value.to(torch.float16)]


@dataclass(frozen=True)
class DerivativeAtHalf(Decode):
    derivative: object

    def __call__(self, inputs: Sequence[Tensor], saved: Sequence[Tensor]) -> Tensor:
        (gradient,), (x,) = inputs, saved
        return gradient * self.derivative(x.to(gradient.dtype))  # type: ignore[operator]


@dataclass(frozen=True)
class HalfPrecision(Representation):
    """x in float16, from which the exact derivative is computed in the backward."""

    site: DerivativeSite
    form = "float16"
    bits = 16
    tensors = 1

    @property
    def nbytes(self) -> int:
        return 2 * int(value_of(self.site.source).numel())

    @property
    def encode(self) -> Encode:
        return ToHalf()

    @property
    def decode(self) -> Decode:
        return DerivativeAtHalf(self.site.derivative)


def half_precision(site: Site, config: FewBitConfig) -> Decision | None:
    return HalfPrecision(site) if isinstance(site, DerivativeSite) else None


class Rounded(torch.autograd.Function):
    """The oracle: GELU whose backward has x rounded to float16."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.half())  # type: ignore[attr-defined]
        return nn.functional.gelu(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        x = x.float().requires_grad_()
        with torch.enable_grad():
            (derivative,) = torch.autograd.grad(nn.functional.gelu(x).sum(), x)
        return gradient * derivative


class RoundedGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def test_a_representation_from_outside_runs_end_to_end() -> None:
    torch.compiler.reset()
    model, x = mlp(nn.GELU(), frozen=True), torch.randn(256, 32)
    backend = fewbit_fx.backend(recipe="derivatives", proposals=[half_precision], strict=True)
    output = torch.compile(model, backend=backend)(x)
    (site,) = backend.last_report().sites
    assert (site.function, action(site)) == ("gelu", "stored as float16 in 16 bits")
    assert (site.bytes_before, site.bytes_after) == (256 * 64 * 4, 256 * 64 * 2)
    assert "stored as float16 in 16 bits" in str(backend.last_report())
    torch.testing.assert_close(output, model(x))
    oracle = nn.Sequential(model[0], RoundedGELU(), model[2])
    for found, expected in zip(
        gradients(model, output.square().sum()), gradients(oracle, oracle(x).square().sum()), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_proposals_are_part_of_the_cache_key() -> None:
    from fewbit_fx.passes.partitioner import FewBitPartitioner

    def key(*proposals: object) -> object:
        return FewBitPartitioner(FewBitConfig(), print, (), proposals).uuid()  # type: ignore[arg-type]

    assert key() != key(half_precision)
    assert key(half_precision) == key(half_precision)


def test_what_is_traced_is_the_key_of_its_trace() -> None:
    """Equal layers share encode and decode; another function, number of bits or dtype does not."""

    def parts(activation: nn.Module, bits: int = 3, dtype: torch.dtype = torch.float32) -> list[object]:
        seen = watch(
            mlp(activation).to(dtype),
            torch.randn(64, 32, dtype=dtype),
            config=FewBitConfig(bits, 0, recipe="derivatives"),
        )
        from fewbit_fx.passes.plan import choose

        decisions = [choose(site, FewBitConfig(bits, 0, recipe="derivatives")) for site in seen.sites]
        return [(d.encode, d.decode) for d in decisions if isinstance(d, Representation)]

    assert parts(nn.GELU()) == parts(nn.GELU())
    for other in (parts(nn.SiLU()), parts(nn.GELU(), bits=2), parts(nn.GELU(), dtype=torch.bfloat16)):
        assert parts(nn.GELU()) != other


@pytest.mark.parametrize("skip", ["1", ["1"], ("2", "?")])
def test_sites_of_skipped_modules_are_left_exact(skip: object) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    config = FewBitConfig(recipe="derivatives", min_numel=0, strict=True).updated({"skip": skip})
    seen = watch(model.requires_grad_(False), torch.randn(64, 32, requires_grad=True), config=config)
    (gelu,) = seen.happened("gelu")
    assert (action(gelu), gelu.module) == ("left exact", "1")
    assert because(gelu.reason).startswith("the option skip has ")


def test_skip_names_the_modules_alone() -> None:
    model = mlp(nn.GELU(), frozen=True)
    seen = watch(model, torch.randn(64, 32), config=FewBitConfig(recipe="derivatives", min_numel=0, skip=("2",)))
    assert [action(s) for s in seen.happened("gelu")] == ["coded in 3 bits"]


@pytest.mark.parametrize("skip", [3, ("a", 3), {"a": 1}])
def test_skip_is_checked(skip: object) -> None:
    with pytest.raises(TypeError, match=r"'skip' is .* allowed is a pattern of module paths"):
        FewBitConfig(recipe="derivatives", skip=skip)  # type: ignore[arg-type]


def test_each_decision_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fewbit_fx"):
        fewbit_fx.explain(mlp(nn.GELU(), frozen=True), torch.randn(64, 32), fewbit_config=STRICT)
    lines = [record.getMessage() for record in caplog.records]
    assert any("1 gelu: coded in 3 bits" in line for line in lines)
    assert any("bytes saved instead of" in line for line in lines)
