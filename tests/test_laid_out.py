"""Codes follow the order in which tensors will lie in memory: with channels last around convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import Seen, check_sums, watch
from torch import Tensor, nn

from fewbit_fx.config import FewBitConfig
from fewbit_fx.passes.laid_out import laid_out
from fewbit_fx.passes.sites import Site
from fewbit_fx.torch_private.inductor import lays_channels_last


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 8, 3, padding=1))


class NormOverChannels(nn.Module):
    """As in ConvNeXt: what a convolution makes is viewed with channels last, and so is contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.up = nn.Conv2d(8, 16, 3, padding=1), nn.LayerNorm(16), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.up(self.norm(self.convolution(x).permute(0, 2, 3, 1))))


def planned(model: nn.Module, x: Tensor, recipe: str = "default") -> tuple[Seen, list[tuple[Site, Tensor]]]:
    """What happened, and each site with its tensor as it will lie in memory."""
    seen = watch(model, x, config=FewBitConfig(recipe=recipe, min_numel=0, strict=True))
    return seen, [(site, laid_out(site.stored)) for site in seen.sites]


@pytest.mark.parametrize("recipe", ["default", "lean"])
def test_around_convolutions_channels_are_innermost(recipe: str) -> None:
    model, x = Convolutions(), torch.randn(2, 8, 16, 16, requires_grad=True)
    seen, sites = planned(model, x, recipe)
    inner = [value for site, value in sites if value.dim() == 4 and value.shape[1] == 16 and value.numel() > 16]
    assert inner
    assert all(value.stride(1) == 1 for value in inner)
    assert seen.coded
    check_sums(seen.record)


def test_a_view_with_channels_last_is_contiguous() -> None:
    _, sites = planned(NormOverChannels(), torch.randn(2, 8, 16, 16, requires_grad=True))
    normalised = [(site.stored.meta["val"], value) for site, value in sites if site.function == "product"]
    assert normalised
    assert not any(stated.is_contiguous() for stated, _ in normalised)
    assert all(value.is_contiguous() for _, value in normalised)


@pytest.mark.parametrize("model", [Convolutions, NormOverChannels])
def test_gradients_are_those_of_codes_in_that_order(model: type[nn.Module]) -> None:
    """Blocks of 32 neighbours are others than as stated, and as good."""
    torch.manual_seed(0)
    net, x = model(), torch.randn(2, 8, 16, 16)
    expected = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))

    def error() -> float:
        seen = watch(net, x, config=FewBitConfig(recipe="lean", min_numel=0, strict=True))
        found = torch.autograd.grad(seen.output.square().mean(), list(net.parameters()))
        errors = [(a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True) if b.norm() > 1e-5]
        return float(max(errors))

    laid_out_error = error()
    with torch._inductor.config.patch(layout_optimization=False):
        stated_error = error()
    assert laid_out_error != stated_error
    assert laid_out_error < 1.5 * stated_error + 1e-3
    assert stated_error < 0.1


def test_without_convolutions_or_layouts_of_its_own_all_is_as_stated() -> None:
    linear, x = nn.Sequential(nn.Linear(32, 32), nn.GELU()), torch.randn(64, 32, requires_grad=True)
    assert all(value is site.stored.meta["val"] for site, value in planned(linear, x)[1])
    with torch._inductor.config.patch(layout_optimization=False):
        _, sites = planned(Convolutions(), torch.randn(2, 8, 16, 16, requires_grad=True))
    assert all(value is site.stored.meta["val"] for site, value in sites)


def test_a_view_that_the_layout_has_no_room_for_is_a_copy() -> None:
    """What is decoded may lie otherwise than what a view of it was traced with."""

    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.out = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8 * 64, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.silu(self.convolution(x)).flatten(1))

    model, x = Flattened(), torch.randn(8, 4, 8, 8, requires_grad=True)
    seen, _ = planned(model, x)
    found = torch.autograd.grad(seen.output.square().mean(), list(model.parameters()))
    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    assert all((a - b).norm() <= 0.05 * b.norm() for a, b in zip(found, expected, strict=True))


def test_a_graph_without_convolutions_is_not_laid_out_anew() -> None:
    gm = torch.fx.symbolic_trace(nn.Linear(4, 4))
    assert not lays_channels_last(gm)
