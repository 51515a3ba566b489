"""The Triton kernels of an H100 for parts of models, made on a machine without a GPU.

python -m bench.kernels --bits 3 --recipes default lean

A row of bits is of codes of derivatives on torch.compile's own cut, a row of a recipe of all that the recipe does.

Inductor generates them and Triton compiles them for sm_90, in each configuration that Inductor would try on
the GPU, where it takes the fastest. Counted are kernels, loads and stores, registers and spills, and the bytes that all
operations read and write. Needs triton.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from rich.table import Table
from torch import Tensor, nn

import fewbit_fx
from bench.command import DTYPES, Command, bits_flag, parser_of
from bench.comparison import mebibytes
from bench.llama import LlamaConfig, SwiGLU
from bench.offline_triton import Generated, Kernel, compile_offline, generate
from bench.transformer import MLP, Attention, Block, BlockConfig, plain_attention
from fewbit_fx.config import RECIPES

ACTIVATIONS = {"gelu": nn.GELU, "silu": nn.SiLU}
EXACT = fewbit_fx.FewBitConfig(recipe="exact", recompute=False, masks=False, strict=True)
WIDTH, TOKENS, CHANNELS = 256, 2048, 64


@dataclass(frozen=True)
class Pass:
    """All kernels of a forward or of a backward.

    Attributes:
        kernels: How many.
        loads, stores: Of all of them, as they stand in their sources.
        registers: Of a thread, the most of any kernel in any configuration.
        spilled_bytes: Of a thread, likewise.
        spilled_at_best_bytes: The same with each kernel in the configuration that spills least.
        moved_bytes: Read and written by all operations, matrix products and convolutions included.
    """

    kernels: int
    loads: int
    stores: int
    registers: int
    spilled_bytes: int
    spilled_at_best_bytes: int
    moved_bytes: int

    @classmethod
    def of(cls, kernels: Sequence[Kernel], moved_bytes: int) -> Pass:
        """Compile and count."""
        found = [compile_offline(kernel) for kernel in kernels]
        return cls(
            len(kernels),
            sum(k.loads for k in kernels),
            sum(k.stores for k in kernels),
            max(r.registers for configurations in found for r in configurations),
            max(r.spilled for configurations in found for r in configurations),
            max(min(r.spilled for r in configurations) for configurations in found),
            moved_bytes,
        )


@dataclass(frozen=True)
class Case:
    """One block at one dtype; under inductor where there are neither bits nor a recipe."""

    block: str
    dtype: str
    bits: int | None = None
    recipe: str | None = None

    @property
    def title(self) -> str:
        """What compiles it."""
        return self.recipe or (f"{self.bits} bits" if self.bits else "inductor")

    @property
    def config(self) -> fewbit_fx.FewBitConfig:
        """The options that stand for it."""
        if self.recipe:
            return fewbit_fx.FewBitConfig(recipe=self.recipe, strict=True)
        return fewbit_fx.FewBitConfig(recipe="derivatives", bits=self.bits, strict=True) if self.bits else EXACT


@dataclass(frozen=True)
class Row(Case):
    """A case and what was counted."""

    forward: Pass = field(kw_only=True)
    backward: Pass = field(kw_only=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, generate, compile, and show."""
    parser = parser_of("kernels", __doc__)
    parser.add_argument(
        "--bits", nargs="*", type=bits_flag, default=[1, 2, 3, 4], metavar="B", help="bits per coded element (1 2 3 4)"
    )
    parser.add_argument(
        "--recipes", nargs="*", choices=RECIPES, default=["default", "lean"], help="of fewbit (default and lean)"
    )
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS), help="which blocks (default all)")
    flags = parser.parse_args(arguments)
    command = Command.started("kernels", arguments, flags, ["sm_90, offline", f"{TOKENS} x {WIDTH}"])
    cases, rows = list(_cases(flags)), []
    with command.progress(len(cases)) as show:
        for i, case in enumerate(cases):
            show(f"{case.block} {case.dtype} {case.title}", i)
            generated = _generated(case)
            moved, moved_back = generated.moved_bytes
            passes = Pass.of(generated.forward, moved), Pass.of(generated.backward, moved_back)
            rows.append(Row(**asdict(case), forward=passes[0], backward=passes[1]))
    command.finish(_table(rows), {"rows": [asdict(row) for row in rows]})


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Convolutions(nn.Sequential):
    """Two convolutions with a batch norm and ReLU between them."""

    def __init__(self) -> None:
        super().__init__(_convolution(), nn.BatchNorm2d(CHANNELS, track_running_stats=False), nn.ReLU(), _convolution())


def _convolution() -> nn.Module:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    **{f"mlp, {name}": partial(MLP, BlockConfig(WIDTH, activation=act)) for name, act in ACTIVATIONS.items()},
    "gated mlp": partial(SwiGLU, WIDTH, LlamaConfig.inner_width),
    "norm": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)),
    "attention": lambda: Residual(Attention(BlockConfig(WIDTH, attention=plain_attention))),
    "convolution": Convolutions,
    "transformer": partial(Block, BlockConfig(WIDTH, attention=plain_attention)),
}
SHAPES = {
    "attention": (TOKENS // 256, 256, WIDTH),
    "transformer": (TOKENS // 256, 256, WIDTH),
    "convolution": (8, CHANNELS, 32, 32),
}
"""Of the inputs; of all others (TOKENS, WIDTH)."""


def _cases(flags: argparse.Namespace) -> Iterator[Case]:
    for block in flags.blocks:
        for dtype in DTYPES:
            yield Case(block, dtype)
            yield from (Case(block, dtype, bits=bits) for bits in flags.bits)
            yield from (Case(block, dtype, recipe=recipe) for recipe in flags.recipes)


def _generated(case: Case) -> Generated:
    shape = SHAPES.get(case.block, (TOKENS, WIDTH))
    return generate(BLOCKS[case.block](), shape, getattr(torch, case.dtype), case.config)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="kernels for sm_90: forward + backward")
    for heading in ("block", "dtype", "compiled with"):
        table.add_column(heading)
    for heading in ("kernels", "loads", "stores", "most registers", "spilled bytes", "at best", "moved"):
        table.add_column(heading, justify="right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        passes = (asdict(p).values() for p in (row.forward, row.backward))
        *counts, _ = (f"{forward} + {backward}" for forward, backward in zip(*passes, strict=True))
        moved = f"{mebibytes(row.forward.moved_bytes)} + {mebibytes(row.backward.moved_bytes)}"
        last = following is not None and following.config == EXACT
        table.add_row(row.block, row.dtype, row.title, *counts, moved, end_section=last)
    return table


if __name__ == "__main__":
    main()
