"""Which row counts which bytes, at the level of graphs: rows sum to totals, and each storage counts for one."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT, ReadTwice, TransformerBlock, check_sums, mlp, model_zoo, watch
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx import FewBitConfig
from fewbit_fx.codebooks.activations import derivative_of, recognise
from fewbit_fx.passes.record import SiteRecord
from fewbit_fx.reporting.report import Report
from fewbit_fx.torch_private.sizes import storage_nbytes


def before_and_after(rows: list[SiteRecord]) -> list[tuple[int, int]]:
    return [(row.bytes_before, row.bytes_after) for row in rows]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("budget", [1.0, 0.7])
@pytest.mark.parametrize("name", model_zoo())
def test_rows_sum_to_totals(name: str, budget: float) -> None:
    model, x = model_zoo()[name]
    with torch._functorch.config.patch(activation_memory_budget=budget):
        check_sums(watch(model, x).record)


@pytest.mark.parametrize(
    "config",
    [
        FewBitConfig(recipe="derivatives", strict=True),
        FewBitConfig(recipe="derivatives", derivatives=False, masks=False),
    ],
)
def test_rows_sum_to_totals_where_little_is_coded(config: FewBitConfig) -> None:
    model, x = model_zoo()["gpt"]
    check_sums(watch(model, x, config=config).record)


@pytest.mark.parametrize("width", [63, 64])
def test_rows_sum_to_totals_with_symbolic_sizes(width: int) -> None:
    model = mlp(nn.Sequential(nn.GELU(), nn.Dropout(0.1)), width=width)
    x = torch.randn(48, 32)
    torch._dynamo.mark_dynamic(x, 0)
    seen = watch(model, x)
    assert any(isinstance(n, str) for n in seen.record.others[0].shape)
    assert seen.coded
    check_sums(seen.record)


def test_rows_sum_to_totals_under_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    block = TransformerBlock()
    seen = watch(lambda x: checkpoint(block, x, use_reentrant=False), torch.randn(4, 16, 32, requires_grad=True))
    check_sums(seen.record)


def test_a_site_left_exact_counts_what_is_saved_for_it() -> None:
    """And nothing where nothing is: the sums of all rows would exceed what there is."""
    seen = watch(mlp(nn.GELU()), torch.randn(256, 32), config=FewBitConfig(recipe="derivatives", derivatives=False))
    assert before_and_after(seen.happened("gelu")) == [(256 * 64 * 4,) * 2]
    with torch._functorch.config.patch(activation_memory_budget=0.0):
        recomputed = watch(
            mlp(nn.GELU()), torch.randn(256, 32), config=FewBitConfig(recipe="derivatives", derivatives=False)
        )
    assert before_and_after(recomputed.happened("gelu")) == [(0, 0)]


def test_what_two_sites_share_counts_for_the_first() -> None:
    seen = watch(ReadTwice(), torch.randn(128, 32))
    first, second = before_and_after(seen.happened("gelu"))
    assert first == (128 * 64 * 4, 128 * 64 * 3 // 8)
    assert second == (0, 0)
    check_sums(seen.record)


def test_what_is_saved_otherwise_is_named_by_its_readers() -> None:
    model = nn.Sequential(TransformerBlock(), nn.Unflatten(1, (4, 4)), nn.Conv2d(4, 4, 1))
    others = watch(model, torch.randn(4, 16, 32)).record.others
    readers = {reader for other in others for reader in other.readers}
    assert readers >= {"mm", "convolution_backward"}
    assert any("attention" in reader for reader in readers)
    (before_conv,) = (other for other in others if other.readers == ("convolution_backward",))
    assert (before_conv.shape, before_conv.dtype, before_conv.bytes_before) == (
        (4, 4, 4, 32),
        "float32",
        4 * 16 * 32 * 4,
    )
    (mlp_input,) = (other for other in others if other.module.endswith("0.down"))
    assert (mlp_input.readers, mlp_input.shape) == (("mm",), (64, 128))
    assert "helpers.py:" in mlp_input.source_line


def test_a_fault_leaves_one_row_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("made to fail")

    monkeypatch.setattr("fewbit_fx.passes.pipeline.rewrite", fail)
    with pytest.warns(UserWarning, match="made to fail"):
        report = fewbit_fx.explain(mlp(nn.GELU()), torch.randn(128, 32))
    assert report.plain_bytes > 0
    assert "everything" in str(report)
    check_sums(report.graphs[0])


# Masks.


def expanded_mask(x: Tensor) -> Tensor:
    """Each row of the mask stands for all columns, as an attention mask does for all heads."""
    keep = (torch.rand(x.shape[0], 1) > 0.5).expand(x.shape)
    return torch.where(keep, x, 0.0)


def test_an_expanded_mask_counts_with_its_own_storage() -> None:
    seen = watch(expanded_mask, torch.randn(256, 64, requires_grad=True))
    assert all(storage_nbytes(n) == n.meta["val"].untyped_storage().nbytes() for n in seen.plain.saved())
    (mask,) = seen.record.sites
    assert (mask.dtype, mask.shape, mask.bytes_before) == ("bool", (256, 64), 256), "one byte a row, not an element"
    check_sums(seen.record)


def test_a_mask_of_several_readers_counts_once() -> None:
    def two_readers(x: Tensor, y: Tensor) -> Tensor:
        keep = torch.rand_like(x) > 0.5
        return torch.where(keep, x, 0.0) * 2 + torch.where(keep, y, 0.0)

    seen = watch(two_readers, *(torch.randn(256, 64, requires_grad=True) for _ in range(2)))
    masks = [s for s in seen.record.sites if s.dtype == "bool"]
    assert sum(s.bytes_before for s in masks) == 256 * 64
    assert sum(s.bytes_after for s in masks) == 256 * 64 // 8
    check_sums(seen.record)


@pytest.mark.parametrize(
    ("low", "high", "name"), [(0, 20, "mask"), (-9, 9, "mask"), (0, 6, "relu6"), (0, None, "relu")]
)
def test_the_name_of_a_clamp(low: float, high: float | None, name: str) -> None:
    seen = watch(mlp(Clamp(low, high), frozen=True), torch.randn(256, 32), config=STRICT)
    assert [s.function for s in seen.record.sites if s.dtype == "bool"] == [name]


class Clamp(nn.Module):
    def __init__(self, low: float, high: float | None) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)


def test_a_formula_that_overflows_far_out_keeps_its_name() -> None:
    assert recognise(derivative_of(lambda x: x / (1 + torch.exp(-x)))) == "silu"
    assert recognise(derivative_of(lambda x: torch.log(1 + torch.exp(x)))) == "softplus"
    assert recognise(derivative_of(lambda x: x.clamp(0, 500))) is None


# The table.


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
        self.conv1, self.conv2 = (nn.Conv2d(n, outputs, 3, padding=1) for n in (inputs, outputs))
        self.skip = nn.Conv2d(inputs, outputs, 1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(self.drop(F.silu(self.norm2(y))))


class UNet(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (8, 12, 16, 24, 32)) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(Block(a, b) for a, b in pairs)
        self.up = nn.ModuleList(Block(2 * b, a) for a, b in reversed(pairs))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        return x


def test_the_table_of_many_widths_is_short() -> None:
    seen = watch(UNet(), torch.randn(2, 8, 64, 64), config=FewBitConfig(recipe="derivatives", strict=True))
    assert len(seen.record.rows) > 100
    check_sums(seen.record)
    lines = str(Report((seen.record,))).splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) < 160
    (dropped,) = (line.split() for line in lines if " dropout " in line and "down.*" in line)
    assert dropped[:2] == ["down.*.drop", "(test_bytes_per_row.py:" + dropped[1].split(":")[1]]
    assert dropped[2:6] == ["4", "dropout", "4", "shapes"]
    assert sum("small tensors" in line for line in lines) == 1
    numbers = [line.replace(",", "").split()[-3:-1] for line in lines if line.endswith(("exact", "%")) and "  " in line]
    assert sum(int(before) for before, _ in numbers) == seen.record.plain_bytes
    assert sum(int(after) for _, after in numbers) == seen.record.fewbit_bytes
