"""The leaner cut: what the backward computes again, what it must not, and that nothing changes but the bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import SwiGLU, TransformerBlock, check_interface, check_sums, targets, watch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fewbit_fx.passes.cuts
import fewbit_fx.passes.partitioner
from fewbit_fx import FewBitConfig
from fewbit_fx.passes.cuts import own_cut
from fewbit_fx.passes.partition import Partition
from fewbit_fx.torch_private.sizes import storage_key, storage_nbytes

OWN = FewBitConfig(recipe="exact", recompute=False, masks=False, strict=True, min_numel=0)
LEANER = OWN.updated({"recompute": True})


class RotaryAttention(nn.Module):
    """Queries and keys have a norm before they are rotated, by angles that all layers share (Qwen3, Gemma 3)."""

    def __init__(self, layers: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.maps = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2 * layers))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1], device=x.device), torch.arange(x.shape[2] // self.heads))
        cos, sin = angles.cos(), angles.sin()
        for i, qkv in enumerate(self.maps):
            q, k, v = qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = self.norms[2 * i](q), self.norms[2 * i + 1](k)
            q, k = ((y * cos + y.roll(1, -1) * sin) for y in (q, k))
            x = F.scaled_dot_product_attention(q, k, v.contiguous()).transpose(1, 2).flatten(2)
        return x


class ResidualNorms(nn.Module):
    """What each layer adds to its input has a norm first, so that its backward needs what the layer computes."""

    def __init__(self, layers: int, width: int = 32) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.maps, self.norms, strict=True):
            x = x + norm(linear(x))
        return x


MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "rotary": (RotaryAttention(2), (4, 16, 32)),
    "residual": (ResidualNorms(4), (4, 16, 32)),
    "gated": (SwiGLU(), (4, 16, 32)),
    "transformer": (TransformerBlock(dropout=0.0), (4, 16, 32)),
    "transformer with dropout": (TransformerBlock(dropout=0.3), (4, 16, 32)),
    "convolutions": (
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 3)),
        (2, 4, 12, 12),
    ),
}


def run(model: nn.Module, x: Tensor, config: FewBitConfig) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(1)
    seen = watch(model, x, config=config)
    return seen, list(torch.autograd.grad(seen.output.square().sum(), list(model.parameters())))


@pytest.mark.parametrize("name", MODELS)
def test_fewer_bytes_and_the_same_gradients(name: str) -> None:
    """Bit for bit: by plain ATen, computing again gives the same numbers, dropout included."""
    model, shape = MODELS[name]
    x = torch.randn(shape, requires_grad=True)
    own, expected = run(model, x, OWN)
    leaner, found = run(model, x, LEANER)
    assert own.record.fewbit_bytes == own.record.plain_bytes == leaner.record.plain_bytes
    assert leaner.record.fewbit_bytes < leaner.record.plain_bytes
    assert leaner.record.computes_again
    assert not own.record.computes_again
    assert torch.equal(own.output, leaner.output)
    assert all(map(torch.equal, found, expected))
    check_interface(leaner.chosen)
    check_sums(leaner.record)


class AdaptedMLP(nn.Module):
    """Frozen bfloat16 layers with float32 adapters, as PEFT makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.to(torch.bfloat16).requires_grad_(False)
        self.a_up, self.b_up = nn.Linear(32, 4, bias=False), nn.Linear(4, 64, bias=False)
        self.a_down, self.b_down = nn.Linear(64, 4, bias=False), nn.Linear(4, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y = F.silu(self.up(x) + self.b_up(self.a_up(x.float())))
        y = y.to(torch.bfloat16)
        return self.down(y) + self.b_down(self.a_down(y.float()))


def test_a_wider_copy_is_not_saved() -> None:
    """The adapters read float32 copies of what the frozen layers read before them."""
    model, x = AdaptedMLP(), torch.randn(64, 32, dtype=torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    own, leaner = (watch(model, x, config=config) for config in (OWN, LEANER))
    copies = [n for n in own.chosen.saved() if str(n.target) == "prims.convert_element_type.default"]
    wide = [n for n in copies if n.meta["val"].dtype == torch.float32 and n.meta["val"].shape[-1] in (32, 64)]
    assert len(wide) == 2, "torch.compile saves both"
    assert not {n.name for n in wide} & {n.name for n in leaner.chosen.saved()}
    assert leaner.record.fewbit_bytes < leaner.record.plain_bytes - 64 * 64 * 4
    expected, found = (torch.autograd.grad(seen.output.square().sum(), trained) for seen in (own, leaner))
    assert all(map(torch.equal, found, expected))
    marks = {n.meta.get("recompute") for gm in (leaner.chosen.forward, leaner.chosen.backward) for n in gm.graph.nodes}
    assert marks == {None}, "a mark of ours would count as the user's"


class ReadWide(nn.Module):
    """A part of a bfloat16 tensor that is read in float32."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.fused, self.parts = nn.Linear(32, 32 * parts).to(torch.bfloat16), parts

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x).chunk(self.parts, -1)[0].float().sin()


@pytest.mark.parametrize(("parts", "cuts"), [(1, 2), (3, 3)])
def test_wider_copies_of_views_may_go_either_way(parts: int, cuts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view of a third keeps more bytes than the copy has."""
    made = []

    def counted(*args: Any, **kwargs: Any) -> Partition:
        made.append(own_cut(*args, **kwargs))
        return made[-1]

    for module in (fewbit_fx.passes.cuts, fewbit_fx.passes.partitioner):
        monkeypatch.setattr(module, "own_cut", counted)
    watch(ReadWide(parts), torch.randn(64, 32, dtype=torch.bfloat16), config=LEANER)
    assert len(made) == cuts


@pytest.mark.parametrize("name", MODELS)
def test_only_cheap_operations_are_computed_again(name: str) -> None:
    model, shape = MODELS[name]
    seen = watch(model, torch.randn(shape, requires_grad=True), config=LEANER)
    again = {str(n.target) for n in seen.chosen.backward.graph.nodes if n.op == "call_function"}
    forward = {n.name: str(n.target) for n in seen.chosen.forward.graph.nodes if n.op == "call_function"}
    recomputed = [
        forward[n.name] for n in seen.chosen.backward.graph.nodes if n.name in forward and n.op != "placeholder"
    ]
    assert again
    assert recomputed
    heavy = ("mm", "convolution.", "attention", "var_mean", "inductor_seed")
    assert not [target for target in recomputed if any(part in target for part in heavy)]


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_rotated_queries_are_computed_again_in_every_layer(layers: int) -> None:
    """The angles are read by all layers, far apart, which torch's own rules take for a reason to save the results."""
    x = torch.randn(4, 16, 32, requires_grad=True)
    seen = watch(RotaryAttention(layers), x, config=LEANER)
    large = [n for n in seen.chosen.saved() if n.op == "call_function" and n.meta["val"].numel() >= x.numel()]
    found = {storage_key(n): storage_nbytes(n) for n in large}
    # The input, and of each layer what the map makes, which has values in it too, and what attention returns.
    assert sorted(found.values()) == [x.nbytes] * (1 + layers) + [3 * x.nbytes] * layers


@pytest.mark.parametrize("layers", [2, 3, 8])
def test_residual_sums_are_computed_again_from_one_that_is_saved(layers: int) -> None:
    """Each from the one before would be all of them at the beginning of the backward."""
    x = torch.randn(4, 16, 32, requires_grad=True)
    seen = watch(ResidualNorms(layers), x, config=LEANER)
    saved = [n for n in seen.chosen.saved() if n.op == "call_function" and n.meta["val"].numel() == x.numel()]
    sums = [n for n in saved if n.target is torch.ops.aten.add.Tensor]
    assert len(saved) - len(sums) == layers
    assert len(sums) == (layers - 2) // 2, "the first follows from an input, and nothing reads the last"


def test_random_numbers_are_not_drawn_anew() -> None:
    """Where the decomposition leaves an operator that draws, its result is kept, or the own cut is."""

    def noisy(x: Tensor, w: Tensor) -> Tensor:
        return (F.gelu(x @ w) * torch.bernoulli(torch.full((64, 64), 0.5))).sin()

    x, w = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    seen = watch(noisy, x, w, config=LEANER)
    assert not [t for t in targets(seen.chosen.backward) if "bernoulli" in t or "rand" in t]


@torch.library.custom_op("fewbit_tests::mixed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def mixed(x: Tensor) -> Tensor:
    return x.cumsum(-1)


@torch.library.custom_op("fewbit_tests::mixed_backward", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def mixed_backward(grad: Tensor) -> Tensor:
    return grad.flip(-1).cumsum(-1).flip(-1)


for operator in (mixed, mixed_backward):
    operator.register_fake(torch.empty_like)
mixed.register_autograd(lambda ctx, grad: mixed_backward(grad))


def test_a_backward_may_be_tagged_as_if_it_drew_numbers() -> None:
    """As that of attention on a GPU is, be it without dropout."""
    block, x = TransformerBlock(dropout=0.0), torch.randn(4, 16, 32, requires_grad=True)
    seen = watch(lambda x: mixed(block(x)), x, config=LEANER)
    assert "fewbit_tests.mixed_backward.default" in targets(seen.chosen.backward)
    assert seen.record.fewbit_bytes == watch(block, x, config=LEANER).record.fewbit_bytes < seen.record.plain_bytes


def test_what_a_checkpoint_computes_again_stays_so() -> None:
    block = TransformerBlock(dropout=0.0)
    x = torch.randn(4, 16, 32, requires_grad=True)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False)  # type: ignore[no-any-return]

    seen = watch(checkpointed, x, config=LEANER)
    assert seen.record.fewbit_bytes <= seen.record.plain_bytes < watch(block, x, config=OWN).record.plain_bytes / 2


@pytest.mark.parametrize("budget", [1.0, 0.9, 0.5, 0.2])
def test_at_any_budget_no_more_than_inductor(budget: float) -> None:
    model, x = nn.Sequential(TransformerBlock(dropout=0.0), TransformerBlock(dropout=0.0)), torch.randn(4, 64, 32)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        seen = watch(model, x.requires_grad_(), config=FewBitConfig(strict=True, min_numel=0))
    assert seen.record.fewbit_bytes < seen.record.plain_bytes
    check_sums(seen.record)
