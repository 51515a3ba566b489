"""Recipes: what each sets, what overrides them, and who knows them."""

from __future__ import annotations

import pytest
import torch
from helpers import mlp, watch
from torch import nn

import fewbit_fx
from fewbit_fx import FewBitConfig
from fewbit_fx.config import RECIPES


def test_without_a_recipe_it_is_the_default() -> None:
    assert FewBitConfig() == FewBitConfig(recipe="default")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_its_options(name: str) -> None:
    config = FewBitConfig(recipe=name)
    assert {option: getattr(config, option) for option in RECIPES[name]} == RECIPES[name]


def test_an_option_beside_a_recipe_overrides_it() -> None:
    config = FewBitConfig(recipe="lean", value_bits=None)
    assert config.value_bits is None
    assert config.softmax_bits == RECIPES["lean"]["softmax_bits"]


def test_a_later_recipe_replaces_what_recipes_set_and_nothing_else() -> None:
    config = FewBitConfig(value_bits=4, bits=2).updated({"recipe": "exact", "softmax_bits": 8})
    assert (config.value_bits, config.softmax_bits, config.derivatives, config.bits) == (None, 8, False, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"recipe": "leaner"},
            ValueError,
            "'recipe' is 'leaner' .*allowed is one of 'exact', 'derivatives', 'default'",
        ),
        ({"recipe": 3}, TypeError, "'recipe' is 3"),
        ({"value_bits": 1}, ValueError, "'value_bits' is 1 .*whole number from 2 to 8, or None"),
        ({"norm_bits": 9}, ValueError, "'norm_bits' is 9"),
        ({"softmax_bits": "8"}, TypeError, "'softmax_bits' is '8'"),
        ({"recompute": 1}, TypeError, "'recompute' is 1"),
    ],
)
def test_mistakes(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FewBitConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        fewbit_fx.backend(**options)


def test_the_backend_and_its_report_know_the_recipe() -> None:
    model, x = mlp(nn.GELU()), torch.randn(256, 32)
    by_options = torch.compile(model, backend="fewbit", options={"recipe": "lean", "min_numel": 0})
    by_options(x).sum().backward()
    report = fewbit_fx.last_report()
    assert {graph.recipe for graph in report.graphs} == {"lean"}
    assert "recipe lean" in str(report)
    assert {s.bits for s in report.sites if s.form == "values"} == {RECIPES["lean"]["value_bits"]}


@pytest.mark.parametrize("recipe", ["exact", "derivatives"])
def test_recipes_without_values(recipe: str) -> None:
    model = nn.Sequential(*mlp(nn.GELU(), frozen=True), nn.ReLU(), nn.Linear(16, 8).requires_grad_(False))
    seen = watch(model, torch.randn(256, 32), config=FewBitConfig(recipe=recipe, min_numel=0, strict=True))
    assert {s.form for s in seen.coded} == ({"mask"} if recipe == "exact" else {"mask", "codes"})


def test_convert_knows_recipes() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.GELU(), nn.TransformerEncoderLayer(8, 2, 16))

    assert list(fewbit_fx.convert(model(), recipe="exact")) == ["1", "3.activation"]
    assert list(fewbit_fx.convert(model(), recipe="lean")) == ["1", "2", "3.activation"]
    with pytest.raises(ValueError, match="'recipe' is 'x'"):
        fewbit_fx.convert(model(), recipe="x")
