"""verify and Watch: numbers that are known beforehand, and nothing left behind."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import TransformerBlock, mlp
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx.dynamo.verifier import ParameterError, Verification


def squares(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def batch(rows: int = 64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, 32), torch.randn(rows, 16)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("recipe", ["derivatives", "default", "lean"])
def test_errors_are_those_of_a_compiled_step(recipe: str) -> None:
    model, (x, y) = mlp(nn.GELU(), width=256), batch(128)
    config = fewbit_fx.FewBitConfig(recipe=recipe, strict=True)
    found = fewbit_fx.verify(model, x, y, loss=squares, fewbit_config=config)
    names = [name for name, _ in model.named_parameters()]
    exact = torch.autograd.grad(squares(model, x, y), list(model.parameters()))
    torch.compiler.reset()
    run = torch.compile(model, backend=fewbit_fx.backend(recipe=recipe, strict=True))
    coded = torch.autograd.grad(squares(run, x, y), list(model.parameters()))
    for name, a, b in zip(names, exact, coded, strict=True):
        (row,) = (p for p in found.parameters if p.name == name)
        assert row.relative_error == pytest.approx(float((b - a).norm() / a.norm()), rel=0.02, abs=1e-5)
    assert found.loss_identical
    assert 0 < found.relative_error < 0.05
    assert found.bytes_after < found.bytes_before


def test_the_noise_is_that_between_batches() -> None:
    model, (x, y) = mlp(nn.GELU(), width=256), batch(128)
    gradient = torch.autograd.grad(squares(model, x, y), list(model.parameters()))
    first, second = (
        torch.autograd.grad(squares(model, *half), list(model.parameters()))
        for half in ((x[:64], y[:64]), (x[64:], y[64:]))
    )
    noise = math.hypot(*(float((a - b).norm()) / 2 for a, b in zip(first, second, strict=True)))
    found = fewbit_fx.verify(model, x, y, loss=squares)
    size = math.hypot(*(float(g.norm()) for g in gradient))
    assert found.share_of_noise == pytest.approx(found.relative_error * size / noise, rel=1e-3)
    other = torch.randn(128, 32), torch.randn(128, 16)
    moved = torch.autograd.grad(squares(model, *other), list(model.parameters()))
    noise = math.hypot(*(float((a - b).norm()) for a, b in zip(gradient, moved, strict=True))) / math.sqrt(2)
    for another in (other, {"x": other[0], "y": other[1]}):
        found = fewbit_fx.verify(model, x, y, loss=squares, another=another)
        assert found.share_of_noise == pytest.approx(found.relative_error * size / noise, rel=1e-3)


def test_an_odd_batch_has_no_halves() -> None:
    found = fewbit_fx.verify(mlp(nn.GELU(), width=256), *batch(129), loss=squares)
    assert found.share_of_noise is None
    assert "of itself" in found.verdict
    assert "not known, because the batch has no two halves; give another batch" in str(found)


def test_a_half_that_the_model_does_not_take_says_what_it_raised() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return squares(model, x.view(128, 32), y)

    found = fewbit_fx.verify(mlp(nn.GELU(), width=256), *batch(128), loss=loss)
    assert found.share_of_noise is None
    assert "half of the batch raises" in str(found)
    assert "128" in str(found)


class Experts(nn.Module):
    """One expert for each sign of the batch; the other gets no gradient at all."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = mlp(nn.GELU(), width=256), mlp(nn.GELU(), width=256)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.sum() > 0 else self.other(x)


def test_a_parameter_without_a_gradient_in_another_batch_counts_as_0_there() -> None:
    x, y = batch(128)
    model = Experts()
    found = fewbit_fx.verify(model, x.abs(), y, loss=squares, another=(-x.abs(), y))
    assert {p.name.split(".")[0] for p in found.parameters} == {"one"}
    exact = torch.autograd.grad(squares(model, x.abs(), y), list(model.one.parameters()))
    moved = torch.autograd.grad(squares(model, -x.abs(), y), list(model.other.parameters()))
    size, noise = (math.hypot(*(float(g.norm()) for g in gs)) for gs in (exact, (*exact, *moved)))
    assert found.share_of_noise == pytest.approx(found.relative_error * size / (noise / math.sqrt(2)), rel=1e-3)
    in_halves = torch.cat([x.abs()[:64], -x.abs()[64:] / 2])
    assert fewbit_fx.verify(model, in_halves, y, loss=squares).share_of_noise is not None


def test_nothing_is_left_behind() -> None:
    class WithBuffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.block = nn.BatchNorm1d(16), TransformerBlock(dropout=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.norm(x)).square().mean()

    model, x = WithBuffer(), torch.randn(4, 16, 32)
    kept = torch.randn_like(model.block.up.weight)
    model.block.up.weight.grad = kept
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    compiled, state = torch.compile(model, backend="eager"), torch.get_rng_state()
    found = fewbit_fx.verify(compiled, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert model.block.up.weight.grad is kept
    assert model.block.down.weight.grad is None
    assert found.loss_identical  # the same dropout in both steps


def test_the_loss_of_an_output_and_labels_by_name() -> None:
    class Output:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(nn.GELU(), width=256)

        def forward(self, x: Tensor, labels: Tensor) -> Output:
            return Output(F.cross_entropy(self.body(x), labels))

    found = fewbit_fx.verify(Classifier(), x=torch.randn(64, 32), labels=torch.randint(16, (64,)))
    assert {p.name for p in found.parameters} == {f"body.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}


def test_mistakes_are_named() -> None:
    model, (x, y) = mlp(nn.GELU()), batch()
    with pytest.raises(TypeError, match=r"the loss is of shape \(64, 16\)"):
        fewbit_fx.verify(model, x)
    with pytest.raises(TypeError, match="the loss is int"):
        fewbit_fx.verify(model, x, y, loss=lambda model, x, y: 1)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        fewbit_fx.verify(mlp(nn.GELU()).requires_grad_(False), x, y, loss=squares)
    with pytest.raises(ValueError, match="every is 0"):
        fewbit_fx.Watch(model, every=0)
    with pytest.raises(ValueError, match="bound is 0"):
        fewbit_fx.Watch(model, bound=0)


def of(error: float, share: float | None, before: int = 100, after: int = 50) -> Verification:
    row = ParameterError("w", error, 1.0, 40.0, share)
    return Verification((row,), error, share, None, before, after, True)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (
            of(0.01, 0.02),
            "gradient by 1.00%, which is 2.0% of what another batch changes it by. Training will not",
        ),
        (of(0.2, 0.3), "compare the losses of a short run"),
        (of(0.2, 0.8), "That is too much: use more bits"),
        (of(0.2, None), "Codes change the gradient by 20.00% of itself. Training will hardly show it"),
        (of(0.0, 0.0), "the same, bit for bit"),
        (of(0.0, 0.0, 100, 100), "Nothing is saved"),
        (of(math.nan, 0.0), "not finite"),
    ],
)
def test_verdicts(found: Verification, verdict: str) -> None:
    assert verdict in found.verdict
    assert str(found).endswith(found.verdict)


@pytest.mark.slow
def test_the_table_begins_with_the_worst() -> None:
    config = fewbit_fx.FewBitConfig(recipe="lean")
    model = nn.Sequential(*(TransformerBlock() for _ in range(2)))
    found = fewbit_fx.verify(
        model, torch.randn(4, 64, 32), loss=lambda m, x: m(x).square().mean(), fewbit_config=config
    )
    shares = [p.share_of_noise for p in found.parameters]
    assert shares == sorted(shares, reverse=True)
    lines = str(found).splitlines()
    assert lines[1].split()[0] == found.parameters[0].name
    assert "and 16 more" in lines[9]


def test_watch_measures_in_its_turn_and_warns_beyond_the_bound() -> None:
    model, data = mlp(nn.GELU(), width=256), batch(128)
    watch = fewbit_fx.Watch(model, every=3, loss=squares)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [watch(*data) for _ in range(4)]
    assert [step for step, _ in watch.history] == [0, 3]
    assert [f is None for f in found] == [False, True, True, False]
    strict = fewbit_fx.Watch(model, bound=1e-6, loss=squares)
    with pytest.warns(UserWarning, match=r"fewbit-fx at step 0: Codes change .* worst are [\w.]+, "):
        strict(*data)


def test_a_gradient_that_is_mere_rounding_does_not_lead_the_table() -> None:
    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).view(4, 64, 2, 32).transpose(1, 2) for f in (self.q, self.k, self.v))
            return F.scaled_dot_product_attention(q, k, v).square().mean()

    torch.manual_seed(0)
    found = fewbit_fx.verify(Keys(), torch.randn(4, 64, 32), fewbit_config=fewbit_fx.FewBitConfig(recipe="lean"))
    assert found.share_of_noise is None  # the model knows the size of its batch
    assert found.parameters[-1].name == "k.bias"  # what it adds to all scores of a query, softmax takes away
