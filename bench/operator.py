"""Time compiled forwards and backwards of single nonlinearities under fewbit and under inductor.

python -m bench.operator --functions gelu --dtypes bfloat16 --bits 1 2 3 4

Forward: y and what is saved, from x. Backward: grad_x, from grad_y and what was saved. Both go the
whole way of torch.compile and autograd, some tens of microseconds in Python included. A plain copy
that moves as many bytes is timed beside each, as the floor that memory bandwidth sets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor

import fewbit_fx
from bench.command import DTYPES, Command, bits_flag, milliseconds, parser_of, seconds_flag
from bench.measure import keep_freed_memory, what_happened
from bench.timing import Clock, Timing, clock_for, compare
from fewbit_fx.config import LEVELS
from fewbit_fx.torch_private.frames import with_own_code_object
from fewbit_fx.torch_private.inductor import no_buffer_donated

COLUMNS = 1024  # of x, so that it is a matrix as in a model
SIZES = (2**16, 2**22, 2**26)
BITS, SIZE_OF_ALL_BITS, BITS_ELSEWHERE = (1, 2, 3, 4), 2**22, (3,)
PHASES = ("forward", "backward", "both")
SEED = 0


@dataclass(frozen=True)
class Operator:
    """A pointwise function to measure.

    Attributes:
        name: As in --functions.
        function: A plain Python function of x.
        saves: What Inductor saves of it: ``x`` or ``y``, which are there anyway, or ``masks``, which it
            writes for the backward, a byte per element each, and fewbit as one exact bit.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    saves: str

    def written_bytes(self, saved_bytes: int, coded: bool) -> int:
        """Bytes that the forward writes beside y, of those that it saves."""
        return saved_bytes if coded or self.saves == "masks" else 0


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("gelu", lambda x: F.gelu(x), saves="x"),
        Operator("silu", lambda x: F.silu(x), saves="x"),
        Operator("tanh", lambda x: torch.tanh(x), saves="y"),
        Operator("relu+dropout", lambda x: F.dropout(F.relu(x), 0.1), saves="masks"),
    )
}


@dataclass(frozen=True)
class Case:
    """One function at one dtype and size, under inductor and under fewbit with several numbers of bits and levels."""

    operator: Operator
    dtype: str
    numel: int
    bits: tuple[int, ...]
    levels: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operator.name} {self.dtype} {self.numel:,}"


@dataclass(frozen=True)
class Phase:
    """The forward, the backward, or both in turn.

    Attributes:
        timing: Of the compiled code; the ratio is to inductor.
        moved_bytes: Bytes that have to be read and written, in all.
        copy_s: Median time of a plain copy that reads and writes as many, in seconds.
        over_copy: The median time over that of the copy.
    """

    timing: Timing
    moved_bytes: int
    copy_s: float
    over_copy: float


@dataclass(frozen=True)
class Row:
    """One case under one backend.

    Attributes:
        operator, dtype, numel: The case.
        backend: ``inductor`` or ``fewbit``.
        bits: fewbit's option, bits per element; None for inductor.
        levels: fewbit's option; None for inductor.
        saved: What is saved for the backward, in words, one for each kind of site.
        saved_bytes: Bytes of it.
        forward, backward, both: Times.
    """

    operator: str
    dtype: str
    numel: int
    backend: str
    bits: int | None
    levels: str | None
    saved: tuple[str, ...]
    saved_bytes: int
    forward: Phase
    backward: Phase
    both: Phase


class Compiled:
    """A function compiled by a backend for one x, with a forward that its backward can be repeated from."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], backend: str | fewbit_fx.FewBitBackend, x: Tensor, gradient: Tensor
    ) -> None:
        self._x, self._gradient = x, gradient
        # A donated buffer forbids a second backward. None of these functions' kernels would reuse one:
        # x and y are not donated, and masks and codes are smaller than grad_x.
        with no_buffer_donated():
            self._function = torch.compile(with_own_code_object(function), backend=backend, dynamic=False)
            self._y = self._function(x)
            self.backward()

    def forward(self) -> Tensor:
        """y, and what is saved."""
        return self._function(self._x)

    def backward(self) -> Tensor:
        """grad_x, from what was saved."""
        return torch.autograd.grad(self._y, self._x, self._gradient, retain_graph=True)[0]

    def both(self) -> Tensor:
        """A forward and its backward."""
        return torch.autograd.grad(self.forward(), self._x, self._gradient)[0]


@dataclass(frozen=True)
class Candidate:
    """A backend at work on a case: what a row says of it before it is timed."""

    backend: str
    bits: int | None
    levels: str | None
    saved: tuple[str, ...]
    saved_bytes: int
    moved_bytes: Mapping[str, int]
    compiled: Compiled

    @property
    def name(self) -> str:
        """Such as ``fewbit 3 sampled``."""
        return self.backend if self.bits is None else f"{self.backend} {self.bits} {self.levels}"


def measure(
    case: Case, device: torch.device, clock: Clock, seconds: float, advance: Callable[[float], None]
) -> list[Row]:
    """The rows of one case, inductor's first.

    Args:
        case: What to measure.
        device: Where.
        clock: Its clock.
        seconds: Of timing, for the whole case.
        advance: Called with the share that is done, 0 to 1.
    """
    torch.compiler.reset()
    candidates = _candidates(case, device)
    phases = {}
    for i, phase in enumerate(PHASES):
        timed = {c.name: getattr(c.compiled, phase) for c in candidates}
        copies = {_copy_name(n): _copy(n, device) for n in dict.fromkeys(c.moved_bytes[phase] for c in candidates)}
        phases[phase] = compare(
            {**timed, **copies},
            clock=clock,
            seconds=seconds / len(PHASES),
            advance=lambda share, i=i: advance((i + share) / len(PHASES)),
        )
    return [_row(case, candidate, phases) for candidate in candidates]


def _candidates(case: Case, device: torch.device) -> list[Candidate]:
    torch.manual_seed(SEED)
    shape, dtype = (case.numel // COLUMNS, COLUMNS), getattr(torch, case.dtype)
    leaf = torch.randn(shape, device=device).to(dtype).requires_grad_()
    x = leaf + 0  # as inside of a model: a leaf itself lives anyway, and is left exact
    gradient = torch.randn(shape, device=device).to(dtype)
    function = case.operator.function
    plain = Compiled(function, "inductor", x, gradient)
    coded = []
    for bits, levels in product(case.bits, case.levels):
        backend = fewbit_fx.backend(recipe="derivatives", bits=bits, levels=levels, strict=True)
        compiled = Compiled(function, backend, x, gradient)
        report = backend.last_report()
        saved, moved = report.fewbit_bytes, _moved_bytes(case.operator, x, report.fewbit_bytes, report.saving > 0)
        coded.append(Candidate("fewbit", bits, levels, what_happened(report), saved, moved, compiled))
    moved = _moved_bytes(case.operator, x, report.plain_bytes, coded=False)
    return [Candidate("inductor", None, None, (case.operator.saves,), report.plain_bytes, moved, plain), *coded]


def _moved_bytes(operator: Operator, x: Tensor, saved_bytes: int, coded: bool) -> dict[str, int]:
    """Bytes read and written by each phase: x, y and what is saved; grad_y, what was saved and grad_x."""
    forward = 2 * x.nbytes + operator.written_bytes(saved_bytes, coded)
    backward = 2 * x.nbytes + saved_bytes
    return {"forward": forward, "backward": backward, "both": forward + backward}


def _copy_name(moved_bytes: int) -> str:
    return f"copy of {moved_bytes} bytes"


def _copy(moved_bytes: int, device: torch.device) -> Callable[[], object]:
    """A plain copy that reads and writes so many bytes in all."""
    # Not torch.zeros or empty: until it is written to, all of a tensor is one page of zeros, in cache.
    source, target = (torch.ones(moved_bytes // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def _row(case: Case, candidate: Candidate, timings: Mapping[str, Mapping[str, Timing]]) -> Row:
    phases = {}
    for phase, moved_bytes in candidate.moved_bytes.items():
        timing, copy_s = timings[phase][candidate.name], timings[phase][_copy_name(moved_bytes)].median_s
        phases[phase] = Phase(timing, moved_bytes, copy_s, timing.median_s / copy_s)
    return Row(
        case.operator.name,
        case.dtype,
        case.numel,
        candidate.backend,
        candidate.bits,
        candidate.levels,
        candidate.saved,
        candidate.saved_bytes,
        **phases,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, and show."""
    flags = _parser().parse_args(arguments)
    kept = flags.device.type == "cpu" and keep_freed_memory()
    notes = [f"{flags.seconds:g} s a case", *(["malloc keeps freed memory"] if kept else [])]
    command = Command.started("operator", arguments, flags, notes)
    clock = clock_for(command.device)
    cases, rows = list(_cases(flags)), []
    with command.progress(len(cases)) as show:
        for i, case in enumerate(cases):
            rows += measure(
                case, command.device, clock, flags.seconds, lambda share, i=i, c=case: show(str(c), i + share)
            )
    command.finish(_table(rows), {"rows": [asdict(row) for row in rows]})


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("operator", __doc__)
    parser.add_argument(
        "--functions", nargs="+", choices=OPERATORS, default=list(OPERATORS), help="which functions (default all)"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="which dtypes (default both)")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=_size_flag,
        default=SIZES,
        metavar="N",
        help="elements of x, such as 65536 or 2**16, multiples of 1024 (default 2**16 2**22 2**26)",
    )
    parser.add_argument(
        "--bits",
        nargs="+",
        type=bits_flag,
        metavar="B",
        help="bits per coded element, 1 to 8 (default 1 2 3 4 at 2**22 elements and 3 at other sizes)",
    )
    parser.add_argument(
        "--levels", nargs="+", choices=LEVELS, default=LEVELS, help="what levels are fitted to (default all)"
    )
    parser.add_argument(
        "--seconds", type=seconds_flag, default=3.0, help="of timing for each function, dtype and size (default 3)"
    )
    return parser


def _cases(flags: argparse.Namespace) -> Iterator[Case]:
    for name in flags.functions:
        for dtype in flags.dtypes:
            for numel in flags.sizes:
                bits = flags.bits or (BITS if numel == SIZE_OF_ALL_BITS else BITS_ELSEWHERE)
                masks = OPERATORS[name].saves == "masks"  # take one exact bit, whatever the option says
                levels = tuple(flags.levels)
                yield Case(
                    OPERATORS[name], dtype, numel, (1,) if masks else tuple(bits), levels[:1] if masks else levels
                )


def _size_flag(text: str) -> int:
    """A number of elements, also as a power such as ``2**22``."""
    base, _, exponent = text.partition("**")
    least = fewbit_fx.FewBitConfig.min_numel
    allowed = f"a multiple of {COLUMNS} elements, at least {least}, such as 65536 or 2**16"
    try:
        numel = int(base) ** int(exponent or 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed is {allowed}") from None
    if numel % COLUMNS or numel < least:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed is {allowed}")
    return numel


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="nonlinearities by themselves, fewbit against inductor", caption=_CAPTION)
    table.box, table.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
    for heading in ("function", "x", "backend", "saved"):
        table.add_column(heading)
    for heading in ("B", *(text for phase in PHASES for text in (f"{phase}, ms", "ratio", "B moved", "copies"))):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is not None and following.backend == "inductor"
        table.add_row(*_cells(row), end_section=last)
    return table


_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
_CAPTION = (
    "B: bytes saved per element of x. B moved: bytes per element that have to be read and written in all. copies: "
    "time over that of a plain copy that moves as many. ±: half the distance of the quartiles over the median."
)


def _cells(row: Row) -> Iterator[str]:
    yield f"{row.operator} {_SHORT[row.dtype]}"
    yield f"{row.numel / 2**20:g} Mi" if row.numel >= 2**20 else f"{row.numel / 2**10:g} Ki"
    yield row.backend if row.bits is None else f"{row.backend} {row.bits} {row.levels}"
    yield "\n".join(dict.fromkeys(text.partition(": ")[2] or text for text in row.saved))
    yield f"{row.saved_bytes / row.numel:.4g}"
    for phase in (row.forward, row.backward, row.both):
        yield milliseconds(phase.timing)
        yield f"{phase.timing.ratio:.2f}"
        yield f"{phase.moved_bytes / row.numel:.4g}"
        yield f"{phase.over_copy:.1f}"


if __name__ == "__main__":
    main()
