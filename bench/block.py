"""Time an MLP block and a transformer block, trained in full and frozen, under fewbit and under inductor.

python -m bench.block --blocks mlp --dtypes bfloat16 --batches 16

Each time is of a forward and a backward. Frozen: of the block's parameters only those of its layer
norms are trained, and an MLP has none. x requires gradients throughout, as within a model.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch import nn

import fewbit_fx
from bench.command import (
    DTYPES,
    Command,
    MiB,
    add_bits,
    change,
    count_flag,
    milliseconds,
    parser_of,
    seconds_flag,
)
from bench.measure import what_happened
from bench.timing import Clock, Timing, clock_for, compare
from bench.transformer import MLP, Block, BlockConfig

BLOCKS: dict[str, Callable[[BlockConfig], nn.Module]] = {"mlp": MLP, "transformer": Block}
TRAINING = ("full", "frozen")
HEAD_WIDTH = 64
SEED = 0


@dataclass(frozen=True)
class Sizes:
    """Sizes that suit a device.

    Attributes:
        width: Of the model; the MLP's inner width is four times that.
        context: Tokens in a sequence.
        batches: Sequences in a batch, one case each.
    """

    width: int
    context: int
    batches: tuple[int, ...]


SIZES = {"cpu": Sizes(256, 256, (4, 16)), "cuda": Sizes(1024, 512, (32,))}


@dataclass(frozen=True)
class Case:
    """One block at one size."""

    block: str
    training: str
    dtype: str
    batch: int
    context: int
    width: int

    def __str__(self) -> str:
        return f"{self.block} {self.training} {self.dtype} {self.batch} x {self.context} x {self.width}"

    def module(self) -> nn.Module:
        """The block at its seed's initial weights."""
        torch.manual_seed(SEED)
        module = BLOCKS[self.block](BlockConfig(width=self.width, heads=self.width // HEAD_WIDTH))
        for part in module.modules():
            trained = self.training == "full" or isinstance(part, nn.LayerNorm)
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(trained)
        return module.to(getattr(torch, self.dtype))


@dataclass(frozen=True)
class Row:
    """One case under one backend.

    Attributes:
        case: The case.
        backend: ``inductor`` or ``fewbit``.
        saved_bytes: Saved for the backward, without parameters.
        sites: What fewbit did, each kind of site once; empty for inductor.
        timing: Of a forward and a backward; the ratio is to inductor.
    """

    case: Case
    backend: str
    saved_bytes: int
    sites: tuple[str, ...]
    timing: Timing


class ForwardBackward:
    """A forward and a backward of a block that a backend has compiled."""

    def __init__(self, module: nn.Module, backend: str | fewbit_fx.FewBitBackend, case: Case) -> None:
        parameters = list(module.parameters())
        like = {"device": parameters[0].device, "dtype": parameters[0].dtype}
        leaf = torch.randn(case.batch, case.context, case.width, **like).requires_grad_()
        self._x = leaf + 0  # as inside of a model: a leaf itself lives anyway, and is left exact
        self._gradient = torch.randn(case.batch, case.context, case.width, **like)
        self._wanted = [self._x, *(p for p in parameters if p.requires_grad)]
        self._compiled = torch.compile(module, backend=backend, dynamic=False)

    def __call__(self) -> None:
        torch.autograd.grad(self._compiled(self._x), self._wanted, self._gradient)


def measure(
    case: Case, bits: int, device: torch.device, clock: Clock, seconds: float, advance: Callable[[float], None]
) -> list[Row]:
    """The rows of one case, inductor's first.

    Args:
        case: What to measure.
        bits: Bits per coded element.
        device: Where.
        clock: Its clock.
        seconds: Of timing.
        advance: Called with the share that is done, 0 to 1.
    """
    torch.compiler.reset()
    module, backend = case.module().to(device), fewbit_fx.backend(recipe="derivatives", bits=bits, strict=True)
    candidates = {
        "inductor": ForwardBackward(copy.deepcopy(module), "inductor", case),
        "fewbit": ForwardBackward(module, backend, case),
    }
    timings = compare(candidates, clock=clock, seconds=seconds, advance=advance)
    report = backend.last_report()
    return [
        Row(case, "inductor", report.plain_bytes, (), timings["inductor"]),
        Row(case, "fewbit", report.fewbit_bytes, what_happened(report), timings["fewbit"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, and show."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    command = Command.started("block", arguments, flags, [f"bits {flags.bits}", f"{flags.seconds:g} s a case"])
    cases, rows = _cases(flags), []
    with command.progress(len(cases)) as show:
        for i, case in enumerate(cases):
            rows += measure(
                case,
                flags.bits,
                command.device,
                clock_for(command.device),
                flags.seconds,
                lambda share, i=i, case=case: show(str(case), i + share),
            )
    command.finish(_table(rows), {"bits": flags.bits, "rows": [asdict(row) for row in rows]})


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("block", __doc__)
    add_bits(parser)
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS), help="which blocks (default both)")
    parser.add_argument(
        "--training", nargs="+", choices=TRAINING, default=TRAINING, help="all weights, or frozen ones (default both)"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of weights and x (default both)")
    cpu, cuda = SIZES["cpu"], SIZES["cuda"]
    parser.add_argument(
        "--width",
        type=_width_flag,
        help=f"of the model, a multiple of {HEAD_WIDTH} (default {cpu.width}, on cuda {cuda.width})",
    )
    parser.add_argument(
        "--context", type=count_flag, help=f"tokens in a sequence (default {cpu.context}, on cuda {cuda.context})"
    )
    parser.add_argument(
        "--batches",
        nargs="+",
        type=count_flag,
        metavar="N",
        help=f"sequences in a batch (default {' '.join(map(str, cpu.batches))}, on cuda {cuda.batches[0]})",
    )
    parser.add_argument("--seconds", type=seconds_flag, default=3.0, help="of timing for each case (default 3)")
    return parser


def _cases(flags: argparse.Namespace) -> list[Case]:
    default = SIZES[flags.device.type]
    width, context = flags.width or default.width, flags.context or default.context
    return [
        Case(block, training, dtype, batch, context, width)
        for block in flags.blocks
        for training in flags.training
        for dtype in flags.dtypes
        for batch in flags.batches or default.batches
    ]


def _width_flag(text: str) -> int:
    width = count_flag(text)
    if width % HEAD_WIDTH:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed is a multiple of {HEAD_WIDTH}, the width of a head")
    return width


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="blocks, fewbit against inductor", caption="±: half the distance of the quartiles")
    for heading in ("block", "training", "dtype", "batch x context x width"):
        table.add_column(heading)
    for heading in ("inductor saves, MiB", "fewbit", "change", "inductor takes, ms", "fewbit", "ratio"):
        table.add_column(heading, justify="right")
    for plain, fewbit in zip(rows[::2], rows[1::2], strict=True):
        case = plain.case
        table.add_row(
            case.block,
            case.training,
            case.dtype,
            f"{case.batch} x {case.context} x {case.width}",
            f"{plain.saved_bytes / MiB:.2f}",
            f"{fewbit.saved_bytes / MiB:.2f}",
            change(fewbit.saved_bytes, plain.saved_bytes),
            milliseconds(plain.timing),
            milliseconds(fewbit.timing),
            f"{fewbit.timing.ratio:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
