"""Shapes, strides, aliases, writing in place and dtypes: the same as torch.compile, but for the codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import SwiGLU, TransformerBlock
from scenarios import CONFIGS, LEAN, Compile, Scenario, compare, run
from torch import Tensor, nn

FROZEN = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8


class Net(nn.Module):
    """A GELU between frozen and trained layers, coded by its derivative, and a gate, coded by its values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.a(x)) @ FROZEN
        return self.b(F.silu(h) * h)


def gradients(model: nn.Module, y: Tensor, *inputs: Tensor) -> list[Tensor | None]:
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    wanted = [*model.parameters(), *inputs]
    return list(torch.autograd.grad((y * weights).sum() + y.square().sum(), wanted, allow_unused=True))


def calls(inputs: Sequence[Callable[[], Tensor]], make: Callable[[], nn.Module] = Net, **options: Any) -> Scenario:
    """A model compiled once and called with some inputs, a backward after each call."""

    def scenario(compile: Compile) -> tuple[list[Tensor], list[Tensor | None]]:
        model = make()
        compiled = compile(model, **options)
        outputs, found = [], []
        for make_input in inputs:
            x = make_input().requires_grad_()
            y = compiled(x)
            outputs.append(y)
            found += gradients(model, y, x)
        return outputs, found

    return scenario


def rows(*sizes: int) -> list[Callable[[], Tensor]]:
    return [lambda n=n: torch.randn(n, 32) for n in sizes]  # type: ignore[misc]


# Line 1: dynamic shapes.


@pytest.mark.slow
def test_a_changing_batch_of_1_too_is_compiled_anew_or_for_all_sizes() -> None:
    found = compare(calls(rows(48, 33, 1)))
    assert len(found["lean"].records) == 3, "static, for all sizes, and for 1"


@pytest.mark.slow
def test_mark_dynamic_gives_one_graph_for_all_sizes() -> None:
    def marked() -> Tensor:
        x = torch.randn(48 + int(torch.randint(9, ())), 32)
        torch._dynamo.mark_dynamic(x, 0)
        return x

    found = compare(calls([marked, marked]))
    assert len(found["lean"].records) == 1


@pytest.mark.slow
def test_ragged_lengths_of_attention_run_without_kernels_too() -> None:
    """Codes of q, k and v of a symbolic length had other strides than these, which a view of them did not take."""
    lengths = [lambda n=n: torch.randn(2, n, 32) for n in (17, 31)]  # type: ignore[misc]
    scenario = calls(lengths, lambda: TransformerBlock(dropout=0.0), dynamic=True)
    mine, reference, plain = run(scenario, LEAN), run(scenario, LEAN, reference=True), run(scenario, None)
    assert mine.error is None
    assert any(isinstance(s.shape[2], str) for s in mine.coded if s.function == "softmax"), "a symbolic length"
    for one, other in zip(mine.gradients, reference.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, mine.outputs, plain.outputs))


def test_jagged_tensors_give_the_gradients_of_the_codes() -> None:
    def scenario(compile: Compile) -> tuple[list[Tensor], list[Tensor]]:
        model = Net()
        compiled = compile(lambda x: model(x.values() * 2))
        outputs, found = [], []
        for lengths in ((13, 40),):
            x = torch.nested.nested_tensor(
                [torch.randn(n, 32) for n in lengths], layout=torch.jagged, requires_grad=True
            )
            y = compiled(x)
            *of_parameters, of_x = torch.autograd.grad(y.square().sum(), [*model.parameters(), x])
            outputs.append(y)
            found += [*of_parameters, of_x.values()]
        return outputs, found

    compare(scenario)


# Line 2: strides.


def test_strides_of_inputs() -> None:
    inputs: list[Callable[[], Tensor]] = [
        lambda: torch.randn(70, 60)[3:35, 7:55].t(),
        lambda: torch.randn(1, 32).expand(48, 32).detach(),
    ]
    found = compare(calls(inputs, dynamic=False))
    assert len(found["lean"].records) == 2


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced and transposed": lambda h: h[::2, 3:47].transpose(0, 1),
    "overlapping": lambda h: h.unfold(1, 8, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VIEWS)
def test_strides_of_activations(name: str) -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(VIEWS[name](self.a(x))).sin() * 2

    compare(calls(rows(48), Strided))


def test_channels_last() -> None:
    def model() -> nn.Module:
        layers = nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 1)
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)

    inputs: list[Callable[[], Tensor]] = [
        lambda: torch.randn(2, 4, 10, 10).to(memory_format=torch.channels_last),
        lambda: torch.randn(2, 4, 20, 10)[:, :, ::2],
    ]
    compare(calls(inputs, model, dynamic=False))


# Lines 3 and 4: aliases and writing in place.


class Returning(nn.Module):
    """A model that hands out what a function makes of it and x, and writes to it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 64)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def written_to(function: Callable[..., Any]) -> Scenario:
    """The first output is written to in place between forward and backward."""

    def scenario(compile: Compile) -> tuple[list[Tensor], list[Tensor | None]]:
        model = Returning(function)
        first, second = compile(model)(torch.randn(48, 32))
        outputs = [first.detach().clone(), second]
        first.mul_(2)
        return outputs, gradients(model, torch.cat([first.flatten(), second.flatten()]))

    return scenario


def _in_three_layers(m: nn.Module, h: Tensor) -> Tensor:
    """torch.compile saves what each of them reads; a leaner cut would save h alone."""
    return m.b(F.relu(h)).sin() + m.b(h * 2) + m.b(-h)


ALIASES: dict[str, Callable[..., Any]] = {
    "what three layers read": lambda m, x: (h := m.a(x), _in_three_layers(m, h)),
    "a view of it": lambda m, x: ((h := m.a(x)).view(-1), _in_three_layers(m, h)),
    "the activation": lambda m, x: (F.gelu(m.a(x)), F.silu(m.b(x @ m.a.weight.t())) @ FROZEN),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ALIASES)
def test_an_output_that_is_written_to_leaves_the_gradient_right(name: str) -> None:
    compare(written_to(ALIASES[name]))


KEPT: dict[str, Callable[..., Any]] = {
    "x of a GELU": lambda m, x: (h := m.a(x), m.b(F.gelu(h))),
    "probabilities": lambda m, x: (h := m.a(x).softmax(-1), m.b(h)),
}


@pytest.mark.parametrize("name", KEPT)
def test_an_output_that_is_saved_and_written_to_is_an_error_as_with_inductor(name: str) -> None:
    for config in (None, LEAN):
        error = run(written_to(KEPT[name]), config).error
        assert isinstance(error, RuntimeError)
        assert "modified by an inplace operation" in str(error)


IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "part of x": lambda m, x: (h := m.a(x), h[:, :20].relu_(), m.b(F.gelu(h)))[-1],
    "the input": lambda m, x: (x.add_(1), m.b(F.gelu(m.a(x))))[-1],
    "rows of y": lambda m, x: (h := F.gelu(m.a(x)), h[:5].zero_(), m.b(F.silu(h)))[-1],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PLACE)
def test_writing_in_place_within_the_model(name: str) -> None:
    def scenario(compile: Compile) -> tuple[list[Tensor], list[Tensor | None]]:
        model, x = Returning(IN_PLACE[name]), torch.randn(48, 32, requires_grad=True)
        inner = x * 1
        y = compile(model)(inner)
        return [y, inner], gradients(model, y, x)

    compare(scenario)


# Line 11: other dtypes.


@pytest.mark.slow
def test_complex_integer_and_boolean_tensors_beside_coded_ones() -> None:
    class Mixed(SwiGLU):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 32)

        def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
            x = self.table(tokens).masked_fill(keep.logical_not().unsqueeze(-1), 0.0)
            turned = torch.view_as_complex(x.view(*x.shape[:-1], 16, 2)) * torch.polar(
                torch.ones(16), torch.arange(16.0)
            )
            return super().forward(torch.view_as_real(turned).flatten(-2)) * (tokens % 3).unsqueeze(-1)

    def scenario(compile: Compile) -> tuple[list[Tensor], list[Tensor | None]]:
        model = Mixed()
        y = compile(model)(torch.randint(11, (4, 16)), torch.rand(4, 16) > 0.3)
        return [y], gradients(model, y)

    compare(scenario, tuple(CONFIGS))
