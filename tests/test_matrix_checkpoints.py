"""The matrix: checkpoints, budgets of memory, and what else computes or draws again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import SwiGLU, mlp
from recording import EXACT, LEAN, Recording, error, run
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fewbit_fx
from fewbit_fx.config import FewBitConfig
from fewbit_fx.torch_private.inductor import activation_memory_budget

aten, prims = torch.ops.aten, torch.ops.prims
Policy = Callable[..., CheckpointPolicy]


def test_checkpoint_saves_no_more_than_it_did() -> None:
    layers = nn.ModuleList(nn.Sequential(mlp(nn.GELU()), nn.Dropout(0.3), nn.Linear(16, 32)) for _ in range(2))
    x = torch.randn(64, 32, requires_grad=True)

    def loss(**options: Any) -> Tensor:
        h = x * 1
        for layer in layers:
            h = checkpoint(layer, h, **options) if options else layer(h)
        return h.square().mean()

    kept, _ = run(loss, [*layers.parameters()], LEAN)
    for reentrant in (False, True):
        again, _ = run(functools.partial(loss, use_reentrant=reentrant), [*layers.parameters()], LEAN)
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


RANDOM_STATE = 8, 5056  # bytes of what dropout is drawn again from: a seed or, in torch 2.15, a generator's state


@pytest.mark.parametrize(
    ("policy", "plain"),
    [
        (recompute_all, 8192),  # the input
        (must_save_products, None),
        (must_recompute_silu, None),
        (save_all, None),
    ],
)
def test_selective_checkpoint(policy: Policy, plain: int | None) -> None:
    """Codes stand for what a policy saves; what it computes again stays so."""
    model, x = nn.Sequential(SwiGLU(), nn.Dropout(0.2)), torch.randn(64, 32)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def loss() -> Tensor:
        return checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().mean()  # type: ignore

    recording, _ = run(loss, [*model.parameters()], LEAN)
    assert recording.check() == 1
    if plain is not None:
        assert recording.plain_bytes == recording.fewbit_bytes
        assert recording.plain_bytes - plain in RANDOM_STATE
    else:
        least, most = RANDOM_STATE
        assert recording.fewbit_bytes - least < (recording.plain_bytes - least) / 2 + most


@pytest.mark.slow
def test_hugging_face_gradient_checkpointing() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=64, n_head=4, vocab_size=128, resid_pdrop=0.2)
    model, tokens = transformers.GPT2LMHeadModel(config).train(), torch.randint(0, 128, (2, 32))
    plain = []
    for enable in (lambda **_: None, model.gradient_checkpointing_enable):
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        recording, _ = run(lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss, [], LEAN)
        assert recording.check() == len(recording.graphs)
        assert recording.fewbit_bytes < recording.plain_bytes
        plain.append(recording.plain_bytes)
    assert plain[1] < plain[0]


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


def drawn_in_backward(recording: Recording) -> list[str]:
    """What the backward draws anew: it may make numbers again from a seed that is saved."""
    operations = {n.target for g in recording.graphs for w in g.works for n in w.chosen.backward.graph.nodes}
    drawn = {t for t in operations if torch.Tag.nondeterministic_seeded in getattr(t, "tags", ())}
    return [*map(str, drawn - {prims.inductor_lookup_seed.default, prims.inductor_random.default})]


@pytest.mark.parametrize(
    ("function", "again", "budget"),
    [
        (masked, False, 0.9),
        (masked, False, 0.5),
        (masked, False, 0.0),
        (by_generator, False, 0.5),
        (by_generator, False, 0.0),
        (masked, True, 0.5),
        (by_generator, True, 0.0),
    ],
)
def test_a_budget_has_one_mask_of_dropout(function: Callable[..., Tensor], again: bool, budget: float) -> None:
    """Where torch.compile itself, below 1, draws another in the backward (pytorch 190717)."""
    exact, lean = Recording(EXACT), Recording(LEAN)
    found, expected = gradients_of_one_mask(function, again, budget, exact.backend)
    assert error([found], [expected]) <= 1e-5
    gradients_of_one_mask(function, again, budget, lean.backend)
    for recording in (exact, lean):
        assert recording.check() == 1
        assert not drawn_in_backward(recording)


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
    assert not drawn_in_backward(recording)


def test_deterministic_algorithms() -> None:
    model, x = nn.Sequential(SwiGLU(), nn.Dropout(0.2), mlp(nn.GELU())), torch.randn(64, 32)
    config = FewBitConfig(recipe="lean", rounding="stochastic", min_numel=0, strict=True)
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
