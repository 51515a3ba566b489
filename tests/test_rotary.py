"""Keys that are rotated after a bias was added: a few channels of theirs may be much larger than the others."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import Seen, check_sums, watch
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx.config import FewBitConfig
from fewbit_fx.passes.reasons import Cause
from fewbit_fx.passes.record import SiteRecord

WIDTH, HEADS, TOKENS = 64, 2, 64


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in Llama: the first half of a head's channels with the second."""
    one, other = x.chunk(2, -1)
    return x * torch.cat([cos, cos], -1) + torch.cat([-other, one], -1) * torch.cat([sin, sin], -1)


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in GPT-J: each channel with the next."""
    one, other = x[..., ::2], x[..., 1::2]
    return torch.stack([one * cos - other * sin, other * cos + one * sin], -1).flatten(-2)


def a_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in GPT-NeoX: half of the channels."""
    rotated, rest = x.chunk(2, -1)
    return torch.cat([halves(rotated, cos[..., ::2], sin[..., ::2]), rest], -1)


def not_at_all(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x


ROTATIONS = {f.__name__: f for f in (halves, neighbours, a_part)}


class Attention(nn.Module):
    """A layer of attention and what is behind it."""

    def __init__(self, rotation: str = "halves", fused: bool = True, bias: bool = True, normed: bool = False) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(2))
        self.value, self.next, self.last = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.norm = nn.RMSNorm(WIDTH // HEADS) if normed else nn.Identity()
        self.rotation, self.fused = {**ROTATIONS, "not_at_all": not_at_all}[rotation], fused
        angles = torch.arange(TOKENS).unsqueeze(-1) * 0.01 ** torch.linspace(0, 1, WIDTH // HEADS // 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(-1, TOKENS, HEADS, WIDTH // HEADS) for layer in (self.query, self.key, self.value))
        q, k, v = (t.transpose(1, 2) for t in (self.norm(q), self.norm(k), v))
        q, k = (self.rotation(t, self.cos, self.sin) for t in (q, k))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        return self.last(F.gelu(self.next(y.transpose(1, 2).flatten(2)))).square().mean()


def rotated(seen: Seen) -> list[SiteRecord]:
    """The sites that are exact for that reason."""
    return [s for s in seen.record.sites if s.reason is not None and s.reason.cause is Cause.ROTATED]


def config(recipe: str) -> FewBitConfig:
    return FewBitConfig(recipe=recipe, strict=True, min_numel=0)


@pytest.mark.one_in(12)
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("recipe", ["default", "lean"])
def test_channels_of_keys_that_are_large(recipe: str, fused: bool, rotation: str) -> None:
    model, x = Attention(rotation, fused), torch.randn(4, TOKENS, WIDTH)
    with torch.no_grad():
        model.key.bias.view(HEADS, -1)[:, :2] = 100.0
        channels, small = torch.arange(WIDTH // HEADS), WIDTH // HEADS // 4
        for of_query in (model.query.weight, model.query.bias):  # or attention would look at one token alone
            of_query.view(HEADS, WIDTH // HEADS, -1)[:, channels % small < 2] *= 0.01
    found = fewbit_fx.verify(model, x, fewbit_config=config(recipe))
    assert found.loss_identical
    assert found.bytes_after < found.bytes_before, "the rest is coded all the same"
    assert 0 < max(p.relative_error for p in found.parameters) <= 0.05, "where keys were coded, 9 to 45 %"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("fused", [False, True])
def test_which_tensors_are_exact(fused: bool, rotation: str) -> None:
    seen = watch(Attention(rotation, fused), torch.randn(4, TOKENS, WIDTH), config=config("lean"))
    assert sum(math.prod(s.shape) == 4 * TOKENS * WIDTH for s in rotated(seen)) == (4 if fused else 2)
    check_sums(seen.record)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options", [{"bias": False}, {"rotation": "not_at_all"}, {"normed": True}], ids=["no bias", "no rotation", "a norm"]
)
def test_other_keys_are_coded(options: dict[str, bool], fused: bool) -> None:
    seen = watch(Attention(fused=fused, **options), torch.randn(4, TOKENS, WIDTH), config=config("lean"))
    assert not rotated(seen)


def test_sizes_that_change() -> None:
    seen = watch(Attention(), torch.randn(4, TOKENS, WIDTH), config=config("lean"), dynamic=True)
    assert rotated(seen)


def test_under_autocast() -> None:
    """A bias is another number then, of which the graph has a copy in bfloat16."""
    model = Attention()

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)  # type: ignore[no-any-return]

    seen = watch(forward, torch.randn(4, TOKENS, WIDTH), config=config("lean"))
    assert rotated(seen)


def test_sums_of_a_layer_with_itself_that_no_attention_reads() -> None:
    first, last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    seen = watch(
        lambda x: last((h := first(x)) + 0.5 * h * h).square().mean(), torch.randn(256, WIDTH), config=config("lean")
    )
    assert not rotated(seen)
