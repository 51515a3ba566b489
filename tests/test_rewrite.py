"""Rewritten partitions: what was matched, the graphs and bytes before and after, and what must not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    STRICT,
    ReadTwice,
    TransformerBlock,
    check_interface,
    lora,
    mlp,
    model_zoo,
    saved_dtypes,
    targets,
    watch,
)
from torch import Tensor, nn

from fewbit_fx import FewBitConfig
from fewbit_fx.passes import rewrite as rewriting
from fewbit_fx.passes.gain import NEEDED, NOT_SAVED
from fewbit_fx.passes.plan import RECOMPUTED
from fewbit_fx.passes.representations.derivative_codes import PRODUCT
from fewbit_fx.passes.splice import trace
from fewbit_fx.reporting.words import action, because

PLAIN = FewBitConfig(recipe="derivatives", derivatives=False, masks=False, min_numel=0, strict=True)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_frozen_mlp_saves_codes_in_place_of_x(bits: int) -> None:
    seen = watch(
        mlp(nn.GELU(), frozen=True),
        torch.randn(256, 32),
        config=FewBitConfig(recipe="derivatives", bits=bits, strict=True),
    )
    (site,) = seen.record.sites
    assert action(site) == f"coded in {bits} bit{'s' if bits > 1 else ''}"
    assert (site.bytes_before, site.bytes_after) == (256 * 64 * 4, 256 * 64 * bits // 8)
    assert seen.record.plain_bytes - seen.record.fewbit_bytes == site.bytes_before - site.bytes_after
    assert saved_dtypes(seen.chosen).count(torch.int32) == bits
    check_interface(seen.chosen)


def test_only_the_encode_is_added_to_the_forward_and_the_derivative_leaves_the_backward() -> None:
    seen = watch(mlp(nn.GELU(), frozen=True), torch.randn(256, 32))
    before, after = targets(seen.plain.forward), targets(seen.chosen.forward)
    assert (
        after.count("aten.sum.dim_IntList") - before.count("aten.sum.dim_IntList") == 3 + 1
    )  # one a plane, and what is not finite
    remaining = iter(after)
    assert all(target in remaining for target in before), "the forward's own operations stay, in order"
    for target in ("aten.erf.default", "aten.exp.default"):
        assert target in targets(seen.plain.backward)
        assert target not in targets(seen.chosen.backward)


def test_an_mlp_in_full_training_keeps_y_and_codes_x() -> None:
    seen = watch(mlp(nn.GELU()), torch.randn(256, 32))
    assert [action(s) for s in seen.record.sites] == ["coded in 3 bits"]
    assert saved_dtypes(seen.plain).count(torch.float32) - saved_dtypes(seen.chosen).count(torch.float32) == 1


def test_relu_and_dropout_masks_take_an_eighth() -> None:
    model = mlp(nn.Sequential(nn.ReLU(), nn.Dropout(0.2)), frozen=True)
    seen = watch(model, torch.randn(256, 32))
    assert sorted(s.function for s in seen.coded) == ["dropout", "relu"]
    assert all(s.bytes_after * 8 == s.bytes_before and s.relative_error == 0 for s in seen.coded)
    assert torch.bool in saved_dtypes(seen.plain)
    assert torch.bool not in saved_dtypes(seen.chosen)
    check_interface(seen.chosen)


def test_layers_share_a_codebook_and_stay_separate_sites() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(3)))
    seen = watch(nn.Sequential(model, nn.Linear(32, 1)), torch.randn(128, 32))
    assert [s.module for s in seen.happened("gelu")] == ["0.2.1", "0.1.1", "0.0.1"]
    assert len({s.relative_error for s in seen.happened("gelu")}) == 1


@pytest.mark.parametrize("layers", [2, 5])
def test_what_layers_share_is_traced_once(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the time of the passes does not grow with all the places; each has tensors of its own, though."""
    traced = []
    monkeypatch.setattr(rewriting, "trace", lambda *args: traced.append(args) or trace(*args))
    layer = lambda: nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.1))  # noqa: E731
    model = nn.Sequential(*(layer() for _ in range(layers)), nn.Linear(32, 1))
    seen = watch(model.requires_grad_(False), torch.randn(128, 32, requires_grad=True))
    assert len(seen.coded) == 2 * layers
    assert len(traced) == 4, "encode, decode, pack, unpack"
    assert seen.record.fewbit_bytes == layers * 128 * 32 * (3 + 1) // 8
    check_interface(seen.chosen)


def test_a_saved_view_counts_with_all_of_its_storage() -> None:
    """The allocator keeps the whole product for a third of it."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 96).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).chunk(3, -1)[1].sin().sin()

    seen = watch(
        Part(), torch.randn(64, 32, requires_grad=True), config=FewBitConfig(recipe="derivatives", derivatives=False)
    )
    assert seen.record.plain_bytes == 64 * 96 * 4


def test_two_readers_of_one_x_share_planes() -> None:
    seen = watch(ReadTwice(), torch.randn(128, 32))
    assert all(action(s) == "coded in 3 bits" for s in seen.happened("gelu"))
    assert saved_dtypes(seen.chosen).count(torch.int32) == 3
    check_interface(seen.chosen)


# What must not change.


def unchanged(seen) -> bool:  # type: ignore[no-untyped-def]
    pairs = (seen.plain.forward, seen.chosen.forward), (seen.plain.backward, seen.chosen.backward)
    same = all(targets(a) == targets(b) for a, b in pairs)
    return same and seen.record.plain_bytes == seen.record.fewbit_bytes and not seen.coded


def test_no_nonlinearity_no_change() -> None:
    seen = watch(nn.Linear(32, 32), torch.randn(64, 32))
    assert unchanged(seen)
    assert seen.record.sites == ()


def test_an_x_that_is_needed_anyway_stays_exact() -> None:
    def squashed(x: Tensor) -> Tensor:
        return F.gelu(x) * x  # the product's own derivative reads x

    seen = watch(squashed, torch.randn(64, 64, requires_grad=True))
    assert unchanged(seen)


def test_gates_stay_exact_and_say_why() -> None:
    seen = watch(lambda a, b: F.silu(a) * b, *(torch.randn(64, 64, requires_grad=True) for _ in range(2)))
    assert unchanged(seen)
    assert {because(s.reason) for s in seen.record.sites} <= {
        because(NEEDED),
        because(PRODUCT),
        "its derivative grows without bound",
    }


def test_unbounded_derivatives_stay_exact_and_say_why() -> None:
    seen = watch(lambda x: F.relu(x) ** 2, torch.randn(64, 64, requires_grad=True))
    assert unchanged(seen)
    assert [because(s.reason) for s in seen.happened("squared relu")] == ["its derivative grows without bound"]


def test_small_tensors_stay_exact_and_say_why() -> None:
    seen = watch(mlp(nn.GELU()), torch.randn(63, 32), config=FewBitConfig(recipe="derivatives", strict=True))
    assert unchanged(seen)
    assert [because(s.reason) for s in seen.record.sites] == ["it has 4,032 elements, fewer than min_numel = 4,096"]
    assert watch(mlp(nn.GELU()), torch.randn(64, 32), config=FewBitConfig(recipe="derivatives", strict=True)).coded


def test_switched_off_passes_say_so() -> None:
    model = mlp(nn.Sequential(nn.GELU(), nn.Dropout(0.1)), frozen=True)
    off = FewBitConfig(recipe="derivatives", strict=True, min_numel=0, derivatives=False, masks=False)
    seen = watch(model, torch.randn(64, 32), config=off)
    assert unchanged(seen)
    assert {because(s.reason) for s in seen.record.sites} == {
        "derivatives are switched off (derivatives=False)",
        "masks are switched off (masks=False)",
    }
    only_masks = watch(
        model,
        torch.randn(64, 32),
        config=FewBitConfig(recipe="derivatives", strict=True, min_numel=0, derivatives=False),
    )
    assert [s.function for s in only_masks.coded] == ["dropout"]


def test_too_large_an_error_stays_exact_and_says_so() -> None:
    seen = watch(
        mlp(nn.GELU()),
        torch.randn(64, 32),
        config=FewBitConfig(recipe="derivatives", bits=1, strict=True, min_numel=0, max_relative_error=0.1),
    )
    assert unchanged(seen)
    assert "above max_relative_error = 10%" in because(seen.record.sites[0].reason)


def test_checkpointed_regions_stay_recomputed() -> None:
    from torch.utils.checkpoint import checkpoint

    model = mlp(nn.GELU())
    seen = watch(lambda x: checkpoint(model, x, use_reentrant=False), torch.randn(64, 32, requires_grad=True))
    assert unchanged(seen)
    assert [s.reason for s in seen.happened("gelu")] == [RECOMPUTED]


def test_batch_norm_before_relu_saves_nothing_more() -> None:
    """The input of the next convolution is saved anyway, and the mask follows from it; the last has no next."""
    model, x = model_zoo()["resnet"]
    last, *others = sorted(watch(model, x).happened("relu"), key=lambda s: because(s.reason))
    assert action(last) == "exact one-bit mask"
    assert {s.reason for s in others} <= {NEEDED, NOT_SAVED}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("budget", [1.0, 0.9])
@pytest.mark.parametrize("name", model_zoo())
def test_never_more_bytes_than_inductor(name: str, budget: float) -> None:
    model, x = model_zoo()[name]
    with torch._functorch.config.patch(activation_memory_budget=budget):
        seen = watch(model, x)
    assert seen.plain.saved_bytes() == seen.record.plain_bytes
    assert seen.chosen.saved_bytes() == seen.record.fewbit_bytes
    assert seen.record.fewbit_bytes < seen.record.plain_bytes or unchanged(seen)
    check_interface(seen.chosen)


@pytest.mark.parametrize(
    ("name", "least"), [("gpt", 0.20), ("gpt without dropout", 0.20), ("gpt lora", 0.30), ("convnext", 0.20)]
)
def test_how_much_it_saves(name: str, least: float) -> None:
    model, x = model_zoo()[name]
    record = watch(model, x).record
    assert 1 - record.fewbit_bytes / record.plain_bytes >= least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [32, 33])
def test_dtypes_and_ragged_sizes(dtype: torch.dtype, rows: int) -> None:
    model = mlp(nn.Sequential(nn.GELU(), nn.Dropout(0.1)), width=63, frozen=True).to(dtype)
    seen = watch(model, torch.randn(rows, 32, dtype=dtype))
    assert {s.function for s in seen.coded} == {"gelu", "dropout"}
    gelu = seen.happened("gelu")[0]
    assert gelu.dtype == str(dtype).removeprefix("torch.")
    assert gelu.bytes_after <= -(-rows * 63 // 1024) * 1024 * 3 // 8
    check_interface(seen.chosen)


@pytest.mark.parametrize("width", [63, 64, 1024])
def test_symbolic_shapes(width: int) -> None:
    model = mlp(nn.Sequential(nn.GELU(), nn.Dropout(0.1)), width=width, frozen=True)
    x = torch.randn(48, 32)
    torch._dynamo.mark_dynamic(x, 0)
    seen = watch(model, x)
    assert {s.function for s in seen.coded} == {"gelu", "dropout"}
    assert not isinstance(seen.happened("gelu")[0].shape[0], int)
    assert seen.record.fewbit_bytes < seen.record.plain_bytes
    check_interface(seen.chosen)


def test_frozen_transformer_block_keeps_every_other_saved_tensor() -> None:
    seen = watch(lora(TransformerBlock()), torch.randn(4, 16, 32), config=STRICT)
    before = {n.name for n in seen.plain.saved()}
    after = {n.name for n in seen.chosen.saved() if not n.name.startswith("fewbit_plane")}
    assert after < before


@pytest.mark.parametrize("config", [PLAIN, STRICT], ids=["torch.compile", "fewbit"])
@pytest.mark.parametrize("product", [False, True])
def test_second_derivatives(product: bool, config: FewBitConfig) -> None:
    """As the README says: an error, or nothing where the first gradient is a constant to autograd."""
    weight = torch.randn(16, 16)
    x = torch.randn(32, 16, requires_grad=True)
    y = watch(lambda x: F.gelu(x @ weight if product else x), x, config=config).output
    by_sum, by_square = (torch.autograd.grad(t.sum(), x, create_graph=True)[0] for t in (y, y.square()))
    if product or config is STRICT:
        assert torch.autograd.grad((by_sum + x).sum(), x)[0].eq(1).all()
    else:
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad((by_sum + x).sum(), x)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(by_square.sum(), x, allow_unused=True)
