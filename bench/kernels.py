"""The Triton kernels of an H100 for MLP and transformer blocks, made on a machine without a GPU.

python -m bench.kernels --bits 3

Inductor generates them and Triton compiles them for sm_90, in each configuration that Inductor would try on
the GPU, where it takes the fastest. Counted are kernels, loads and stores, registers and spills. Needs triton.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from rich.table import Table
from torch import nn

import fewbit_fx
from bench.command import DTYPES, Command, bits_flag, parser_of
from bench.offline_triton import Generated, Kernel, compile_for_sm90, generate
from bench.transformer import MLP, Block, BlockConfig, plain_attention

ACTIVATIONS = {"gelu": nn.GELU, "silu": nn.SiLU}
EXACT = fewbit_fx.FewBitConfig(derivatives=False, masks=False, strict=True)
WIDTH, TOKENS = 256, 2048


@dataclass(frozen=True)
class Pass:
    """All kernels of a forward or of a backward.

    Attributes:
        kernels: How many.
        loads, stores: Of all of them, as they stand in their sources.
        registers: Of a thread, the most of any kernel in any configuration.
        spilled_bytes: Of a thread, likewise.
        spilled_at_best_bytes: The same with each kernel in the configuration that spills least.
    """

    kernels: int
    loads: int
    stores: int
    registers: int
    spilled_bytes: int
    spilled_at_best_bytes: int

    @classmethod
    def of(cls, kernels: Sequence[Kernel]) -> Pass:
        """Compile and count."""
        found = [compile_for_sm90(kernel) for kernel in kernels]
        return cls(
            len(kernels),
            sum(k.loads for k in kernels),
            sum(k.stores for k in kernels),
            max(r.registers for configurations in found for r in configurations),
            max(r.spilled for configurations in found for r in configurations),
            max(min(r.spilled for r in configurations) for configurations in found),
        )


@dataclass(frozen=True)
class Row:
    """One block at one dtype; ``bits`` is None without fewbit."""

    block: str
    dtype: str
    bits: int | None
    forward: Pass
    backward: Pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, generate, compile, and show."""
    parser = parser_of("kernels", __doc__)
    parser.add_argument(
        "--bits", nargs="+", type=bits_flag, default=[1, 2, 3, 4], metavar="B", help="bits per coded element (1 2 3 4)"
    )
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS), help="which blocks (default all)")
    flags = parser.parse_args(arguments)
    command = Command.started("kernels", arguments, flags, ["sm_90, offline", f"{TOKENS} x {WIDTH}"])
    cases, rows = list(_cases(flags)), []
    with command.progress(len(cases)) as show:
        for i, (block, dtype, bits) in enumerate(cases):
            show(f"{block} {dtype}", i)
            generated = _generated(block, dtype, bits)
            rows.append(Row(block, dtype, bits, Pass.of(generated.forward), Pass.of(generated.backward)))
    command.finish(_table(rows), {"rows": [asdict(row) for row in rows]})


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    **{f"mlp, {name}": partial(MLP, BlockConfig(WIDTH, activation=act)) for name, act in ACTIVATIONS.items()},
    "transformer": partial(Block, BlockConfig(WIDTH, attention=plain_attention)),
}


def _cases(flags: argparse.Namespace) -> Iterator[tuple[str, str, int | None]]:
    for block in flags.blocks:
        for dtype in DTYPES:
            yield from ((block, dtype, bits) for bits in (None, *flags.bits))


def _generated(block: str, dtype: str, bits: int | None) -> Generated:
    config = EXACT if bits is None else fewbit_fx.FewBitConfig(bits=bits, strict=True)
    shape = (TOKENS // 256, 256, WIDTH) if block == "transformer" else (TOKENS, WIDTH)
    return generate(BLOCKS[block](), shape, getattr(torch, dtype), config)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="kernels for sm_90: forward + backward")
    for heading in ("block", "dtype", "bits"):
        table.add_column(heading)
    for heading in ("kernels", "loads", "stores", "most registers", "spilled bytes", "at best"):
        table.add_column(heading, justify="right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        passes = (asdict(p).values() for p in (row.forward, row.backward))
        counts = [f"{forward} + {backward}" for forward, backward in zip(*passes, strict=True)]
        last = following is not None and following.bits is None
        table.add_row(row.block, row.dtype, str(row.bits or "inductor"), *counts, end_section=last)
    return table


if __name__ == "__main__":
    main()
