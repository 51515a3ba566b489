"""The matrix: checkpoints, budgets of memory, and what else computes or draws again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import SwiGLU, mlp
from recording import DEFAULT, LEAN, RECIPES, Recording, error, run
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fewbit_fx
from fewbit_fx.config import FewBitConfig
from fewbit_fx.torch_private.inductor import activation_memory_budget

aten = torch.ops.aten
Policy = Callable[..., CheckpointPolicy]
BUDGETS = [1.0, 0.9, 0.5, 0.0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpoint_saves_no_more_than_it_did(recipe: str, reentrant: bool) -> None:
    layers = nn.ModuleList(nn.Sequential(mlp(nn.GELU()), nn.Dropout(0.3), nn.Linear(16, 32)) for _ in range(2))
    x = torch.randn(64, 32, requires_grad=True)

    def loss(again: bool) -> Tensor:
        h = x * 1
        for layer in layers:
            h = checkpoint(layer, h, use_reentrant=reentrant) if again else layer(h)
        return h.square().mean()

    kept, _ = run(lambda: loss(False), [*layers.parameters()], RECIPES[recipe])
    again, _ = run(lambda: loss(True), [*layers.parameters()], RECIPES[recipe])
    assert again.check() == 1
    assert again.plain_bytes < kept.plain_bytes / 4
    assert again.fewbit_bytes < kept.fewbit_bytes / 2


def must_save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (aten.mm.default, aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


def must_recompute_silu(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE if op is aten.silu.default else CheckpointPolicy.PREFER_SAVE


def recompute_all(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


def save_all(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize(
    ("policy", "plain", "lean"),
    [
        (recompute_all, 8208, 8208),
        (must_save_products, None, None),
        (must_recompute_silu, None, None),
        (save_all, None, None),
    ],
)
def test_selective_checkpoint(policy: Policy, plain: int | None, lean: int | None) -> None:
    """Codes stand for what a policy saves; what it computes again stays so."""
    model, x = nn.Sequential(SwiGLU(), nn.Dropout(0.2), SwiGLU(), nn.Dropout(0.5)), torch.randn(64, 32)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def loss() -> Tensor:
        return checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().mean()  # type: ignore

    recording, _ = run(loss, [*model.parameters()], LEAN)
    assert recording.check() == 1
    if plain is not None:
        assert (recording.plain_bytes, recording.fewbit_bytes) == (plain, lean)
    else:
        assert recording.fewbit_bytes < recording.plain_bytes / 2


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_hugging_face_gradient_checkpointing(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    size: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 128}
    if name == "Llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, intermediate_size=128))
    else:
        config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=128, resid_pdrop=0.2)
        model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(0, 128, (2, 32))

    def loss() -> Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss  # type: ignore[no-any-return]

    kept, _ = run(loss, [*model.parameters()], DEFAULT)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, _ = run(loss, [*model.parameters()], DEFAULT)
    assert again.check() >= 1
    assert again.plain_bytes < kept.plain_bytes / 2
    assert again.fewbit_bytes < kept.fewbit_bytes


def masked(x: Tensor, w: Tensor) -> Tensor:
    return F.dropout(F.gelu(x @ w), 0.5)


def by_generator(x: Tensor, w: Tensor) -> Tensor:
    return F.gelu(x @ w) * torch.bernoulli(torch.full((64, 64), 0.5)) * 2


def gradients_of_one_mask(
    function: Callable[..., Tensor], again: bool, budget: float, backend: Any
) -> tuple[Tensor, Tensor]:
    """A gradient, and eager PyTorch's with the mask that the forward's output shows."""
    x, w, frozen = torch.randn(64, 64), (torch.randn(64, 64) / 8).requires_grad_(), torch.randn(64, 64) / 8

    def outputs() -> tuple[Tensor, Tensor]:
        y = checkpoint(function, x, w, use_reentrant=False) if again else function(x, w)
        return y, (y @ frozen).sum()

    torch.compiler.reset()
    with activation_memory_budget(budget):
        y, loss = torch.compile(outputs, backend=backend, dynamic=False)()
        (found,) = torch.autograd.grad(loss, w)
    mask = (y != 0).float()
    assert 0.4 < mask.mean() < 0.6
    (expected,) = torch.autograd.grad((2 * mask * F.gelu(x @ w) @ frozen).sum(), w)
    return found, expected


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("function", [masked, by_generator])
@pytest.mark.parametrize("budget", BUDGETS)
def test_activation_memory_budget_has_one_mask_of_dropout(
    budget: float, function: Callable[..., Tensor], again: bool
) -> None:
    """Where torch.compile itself, below 1, draws another in the backward (pytorch 190717)."""
    for config in (FewBitConfig(recipe="exact", min_numel=0, strict=True), LEAN):
        recording = Recording(config)
        found, expected = gradients_of_one_mask(function, again, budget, recording.backend)
        assert recording.check() == 1
        assert error([found], [expected]) <= (1e-5 if not recording.coded or config is not LEAN else 0.1)


def test_a_budget_with_kernels_has_one_mask_of_dropout() -> None:
    backend = fewbit_fx.backend(recipe="exact", min_numel=0, strict=True)
    found, expected = gradients_of_one_mask(masked, False, 0.5, backend)
    assert error([found], [expected]) <= 1e-5


def test_a_budget_has_one_mask_of_dropout_within_attention() -> None:
    """The operator returns a tuple, of which the parts are saved."""
    linear, x = nn.Linear(32, 96), torch.randn(2, 16, 32)

    def loss() -> Tensor:
        q, k, v = linear(x).view(2, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5).square().mean()  # type: ignore[no-any-return]

    with activation_memory_budget(0.1):
        recording, _ = run(loss, [*linear.parameters()], LEAN)
    assert recording.check() == 1
    (graph,) = recording.graphs
    drawn = [
        n for n in graph.works[0].chosen.backward.graph.nodes if "rand" in str(n.target) or "seeds" in str(n.target)
    ]
    assert not [n for n in drawn if "lookup" not in str(n.target) and "inductor_random" not in str(n.target)]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_deterministic_algorithms(rounding: str) -> None:
    model, x = nn.Sequential(SwiGLU(), nn.Dropout(0.2), mlp(nn.GELU())), torch.randn(64, 32)
    config = FewBitConfig(recipe="lean", rounding=rounding, min_numel=0, strict=True)
    torch.use_deterministic_algorithms(True)
    try:
        (first, one), (_, two) = (
            run(lambda: model(x).square().mean(), [*model.parameters()], config) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert first.check() == 1
    assert first.coded
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
