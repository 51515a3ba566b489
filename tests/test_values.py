"""Saved tensors coded for their own values: what is found, the bytes, and gradients against an eager oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check_interface, check_sums, watch
from recording import Recording
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx import FewBitConfig
from fewbit_fx.codec.block_scaled import block_layout, decode_values, encode_values
from fewbit_fx.passes.reasons import Cause
from fewbit_fx.passes.record import SiteRecord
from fewbit_fx.passes.sites import Reader, ValueSite


def config(**options: Any) -> FewBitConfig:
    return FewBitConfig(strict=True, min_numel=0, value_bits=6, norm_bits=6).updated(options)


EXACT = config(recipe="exact", recompute=False)


def coded(x: Tensor, bits: int) -> Tensor:
    layout = block_layout(x, bits)
    return decode_values(encode_values(x.detach(), bits, layout), bits, layout, x)


class GatedMLP(nn.Module):
    def __init__(self, width: int = 64, inner: int = 128) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]

    def oracle(self, x: Tensor, gradient: Tensor, bits: int, product_is_coded: bool) -> list[Tensor]:
        """The gradients of gate, up, down and x, by hand from the decoded tensors."""
        gate, up = x @ self.gate.weight.T, x @ self.up.weight.T
        decoded_x, g, u = coded(x, bits), coded(gate, bits), coded(up, bits)
        product = coded(F.silu(gate) * up, bits) if product_is_coded else F.silu(g) * u
        flowing = gradient @ self.down.weight
        sigmoid = g.sigmoid()
        into_gate, into_up = flowing * u * sigmoid * (1 + g * (1 - sigmoid)), flowing * F.silu(g)
        of_x = into_gate @ self.gate.weight + into_up @ self.up.weight
        return [into_gate.T @ decoded_x, into_up.T @ decoded_x, gradient.T @ product, of_x]


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_gated_mlp(bits: int, recompute: bool) -> None:
    model, x = GatedMLP(), torch.randn(256, 64, requires_grad=True)
    seen = watch(model, x, config=config(value_bits=bits, recompute=recompute, derivatives=False))
    assert all(s.form == "values" and s.bits == bits for s in seen.coded)
    assert len(seen.coded) == (3 if recompute else 4), "x, gate, up, and the product where it is not computed again"
    widths = 64 + 2 * 128 + (0 if recompute else 128)
    assert seen.record.fewbit_bytes == 256 * widths * (bits * 2 + 1) // 16
    check_interface(seen.chosen)
    check_sums(seen.record)
    assert torch.equal(seen.output, watch(model, x, config=EXACT).output), "inductor's own operations"
    gradient = torch.randn(256, 64)
    found = torch.autograd.grad(seen.output, [model.gate.weight, model.up.weight, model.down.weight, x], gradient)
    expected = model.oracle(x.detach(), gradient, bits, product_is_coded=not recompute)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_without_the_option_nothing_is_coded() -> None:
    seen = watch(GatedMLP(), torch.randn(256, 64, requires_grad=True), config=EXACT)
    assert not any(isinstance(site, ValueSite) for site in seen.sites)
    assert seen.record.fewbit_bytes == seen.record.plain_bytes


@pytest.mark.parametrize("shape", [(256, 64), (4, 64, 64)], ids=["as it is", "as a view"])
def test_data_that_the_caller_keeps_is_left_alone(shape: tuple[int, ...]) -> None:
    """A linear layer saves a view of what has more than two dimensions."""
    seen = watch(GatedMLP(), torch.randn(shape), config=config())
    assert not [s for s in seen.coded if s.shape == (256, 64)]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("softmax_bits", [None, 8])
def test_attention_has_bits_of_its_own(softmax_bits: int | None) -> None:
    x = torch.randn(4, 64, 64, requires_grad=True)
    seen = watch(Attention(), x, config=config(softmax_bits=softmax_bits))
    readers = {site.reader for site in seen.sites if isinstance(site, ValueSite)}
    assert Reader.SOFTMAX in readers
    softmax = seen.happened("softmax")
    assert softmax
    assert {s.bits for s in softmax if not s.is_exact} == (set() if softmax_bits is None else {softmax_bits})
    check_interface(seen.chosen)
    check_sums(seen.record)


@pytest.mark.parametrize(
    ("model", "x", "reader"),
    [
        (nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)), torch.randn(256, 64), "norm input"),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)), torch.randn(4, 4, 32, 32), "convolution input"),
        (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(256, 64), "linear input"),
    ],
)
def test_what_reads_a_tensor(model: nn.Module, x: Tensor, reader: str) -> None:
    seen = watch(model, x, config=config())
    assert reader in {s.function for s in seen.coded}


def test_the_leaner_cut_computes_again_and_is_exact() -> None:
    model, x = GatedMLP(), torch.randn(256, 64, requires_grad=True)
    seen = watch(model, x, config=config(value_bits=None, recompute=True))
    assert seen.record.fewbit_bytes < seen.record.plain_bytes
    found = torch.autograd.grad(seen.output.square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_dropout_is_the_same_in_both_directions() -> None:
    """Masks computed again from the seed, or saved: where the output is dropped, so is the gradient."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.5))
    x = torch.randn(256, 64, requires_grad=True)
    backend = fewbit_fx.backend(value_bits=8, recompute=True, min_numel=0, strict=True)
    y = torch.compile(model, backend=backend)(x)
    (gradient,) = torch.autograd.grad(y.sum(), model[0].bias)
    kept = (y != 0).to(y.dtype) * 2
    z = model[0](x)
    derivative = torch.autograd.functional.vjp(F.gelu, z.detach(), kept)[1]
    torch.testing.assert_close(gradient, derivative.sum(0), rtol=0.05, atol=0.5)


def test_statistics_are_left_exact() -> None:
    seen = watch(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), torch.randn(256, 64), config=config())
    assert all(s.shape[-1] != 1 for s in seen.coded)


def test_never_more_bytes() -> None:
    """An expanded tensor is stored once: codes of all its elements would be more."""

    def expanded(x: Tensor, w: Tensor) -> Tensor:
        return (x.expand(64, 64, 64) * w).sin().sum((1, 2))

    x, w = torch.randn(64, 1, 1, requires_grad=True), torch.randn(64, 64, 64, requires_grad=True)
    seen = watch(expanded, x, w, config=config())
    assert seen.record.fewbit_bytes <= seen.record.plain_bytes
    check_sums(seen.record)


class Gated(nn.Module):
    """A norm as Hugging Face writes it, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.weight = nn.Embedding(128, 64), nn.Parameter(torch.ones(64))
        self.first, self.mlp = nn.Linear(64, 64), GatedMLP()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(self.tokens(tokens))
        normed = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        return x + self.mlp(self.weight * normed)


def test_each_saved_tensor_is_a_site_with_its_reason() -> None:
    seen = watch(Gated(), torch.randint(128, (8, 64)), config=config())
    found = {(s.function, s.form or (s.reason.cause.value if s.reason else "")) for s in seen.record.sites}
    assert {("norm input", "values"), ("factor", "values")} <= found
    saved = {(s.shape, s.dtype): s for s in seen.record.sites if s.reason and not s.form}
    statistic = saved[(8, 64, 1), "float32"]
    assert statistic.reason is not None
    assert statistic.reason.cause is Cause.STATISTIC
    tokens = saved[(8, 64), "int64"]
    assert tokens.reason is not None
    assert tokens.reason.cause is Cause.INTEGER
    check_sums(seen.record)


class Weighted(nn.Module):
    """Weights in other precisions, and noise that is added to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(64, 64, bias=False), nn.Parameter(torch.ones(64, 1))
        self.register_buffer("quantised", torch.randint(-8, 8, (64, 64), dtype=torch.int8))
        self.register_buffer("offset", torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        dequantised = self.quantised * torch.tanh(self.scale)
        return F.linear(self.layer(x), dequantised) * (torch.randn(x.shape) + self.offset)


def sites_of(model: nn.Module, x: Tensor, **options: Any) -> list[SiteRecord]:
    """As the backend has them, which knows a parameter from other inputs."""
    recording = Recording(config(**options))
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, backend=recording.backend)(x).float().square().mean().backward()
    assert recording.check() == 1
    (graph,) = recording.graphs
    return [site for record in graph.records for site in record.sites]


@pytest.mark.parametrize("recompute", [False, True])
def test_what_follows_from_parameters_and_buffers_is_exact(recompute: bool) -> None:
    sites = sites_of(Weighted(), torch.randn(256, 64, requires_grad=True) + 0, recompute=recompute)
    weights = [s.shape for s in sites if s.reason and s.reason.cause is Cause.WEIGHT]
    assert weights == [(64, 1), *([] if recompute else [(64, 64), (64, 64)])], "what scales them, and two copies"
    assert [s.shape for s in sites if not s.is_exact] == 3 * [(256, 64)], "two inputs of layers, and the noise"


class Merged(nn.Module):
    """A layer whose weight adapters make, as DoRA's does: a sum, of which each row has a length of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        self.down, self.up = (nn.Parameter(torch.randn(shape)) for shape in ((8, 64), (64, 8)))
        self.length = nn.Parameter(torch.ones(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.frozen + torch.tanh(self.up @ self.down)
        return F.silu(F.linear(x, self.length * weight / weight.norm(dim=1, keepdim=True)))


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_that_adapters_make_are_exact(recompute: bool) -> None:
    """As factors, and where an activation is what makes them."""
    sites = sites_of(nn.Sequential(Merged(), Merged()), torch.randn(512, 64), value_bits=8, recompute=recompute)
    assert {s.shape for s in sites if not s.is_exact} == {(512, 64)}
    kept = {s.function for s in sites if s.reason and s.reason.cause is Cause.WEIGHT}
    assert kept >= {"tanh", *([] if recompute else ["linear input"])}


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities_stand_in_place_of_logits(scale: float, smoothing: float) -> None:
    """The gradient of a cross entropy is linear in them; an error of the logits would grow with their range."""
    head, x, wanted = nn.Linear(64, 512), torch.randn(128, 64) * scale, torch.randint(512, (128,))

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(head(x), wanted, label_smoothing=smoothing)

    seen = watch(loss, x, config=FewBitConfig(recipe="exact", softmax_bits=8, min_numel=0, strict=True))
    (site,) = (s for s in seen.record.sites if s.form == "values")
    assert (site.function, site.shape) == ("softmax", (128, 512))
    check_sums(seen.record)
    (found,) = torch.autograd.grad(seen.output, [head.weight])
    (expected,) = torch.autograd.grad(loss(x), [head.weight])
    assert (found - expected).norm() <= 0.01 * expected.norm()


def test_a_leaf_that_is_an_argument_lives_anyway() -> None:
    """A code of it would come on top of what accumulates its gradient."""
    w, x = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    backend = fewbit_fx.backend(strict=True, min_numel=0)
    compiled = torch.compile(lambda x, w: F.silu(x @ w) @ w, backend=backend)
    compiled(x, w).sum().backward()
    report = backend.last_report()
    assert [(s.function, s.form) for s in report.sites if s.form] == [("factor", "values")], "the product alone"
    assert report.fewbit_bytes == 64 * 64 * 17 // 16


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, lambda a, b: ((a - b).square() + 1e-6).sqrt().mean()])
def test_residuals_of_a_loss_are_left_exact(loss: Any) -> None:
    model, x, target = nn.Linear(64, 64), torch.randn(256, 64), torch.randn(256, 64)
    seen = watch(lambda x: loss(model(x), target), x, config=config())
    assert not seen.coded
    found = torch.autograd.grad(seen.output, list(model.parameters()))
    expected = torch.autograd.grad(loss(model(x), target), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
