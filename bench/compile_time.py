"""Time cold compilations under inductor, with and without its memory budget, and under fewbit with its passes.

python -m bench.compile_time --layers 2 12

What is compiled are the forward and the backward of the demo's GPT at a small width, so that kernels
are small and many. Each compilation has a process and an empty cache of its own, in which a tiny
model has warmed up the compiler before; the backends take turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from rich.table import Table

from bench.backends import BACKENDS, BUDGETED, FEWBIT, INDUCTOR, TITLES, backend_of
from bench.command import Command, add_bits, add_recipe, count_flag, parser_of
from bench.gpt import GPT, GPTConfig
from bench.measure import in_fresh_process, warm_up_the_compiler
from bench.timing import clock_for
from fewbit_fx.dynamo.fewbit_backend import FewBitBackend

REPEATS, REPEATS_OF_A_LARGE_MODEL, LARGE = 3, 1, 24  # a model of more layers than 24 takes minutes
SEED = 0


@dataclass(frozen=True)
class Settings:
    """What is compiled.

    Attributes:
        width: Of the model, a multiple of its 4 heads.
        context: Tokens in a sequence.
        batch: Sequences in a batch.
        recipe: Of fewbit.
        bits: Bits per coded derivative.
        device: cpu or cuda.
    """

    width: int
    context: int
    batch: int
    recipe: str
    bits: int
    device: str

    def __post_init__(self) -> None:
        if self.width % GPTConfig.heads:
            raise ValueError(f"--width {self.width}: allowed is a multiple of the {GPTConfig.heads} heads")


@dataclass(frozen=True)
class Compilation:
    """One cold compilation of a forward and its backward.

    Attributes:
        backend: One of ``bench.backends.BACKENDS``.
        layers: Of the model.
        compile_s: Wall time of the first forward and backward, in seconds.
        pass_s: Of that, in fewbit's own passes, in seconds; 0 under another backend.
        coded: Sites that fewbit coded or packed.
    """

    backend: str
    layers: int
    compile_s: float
    pass_s: float
    coded: int


@dataclass(frozen=True)
class Row:
    """Medians for one number of layers.

    Attributes:
        layers: Of the model.
        repeats: Compilations by each backend of which the medians are taken.
        inductor_s, budget_s, fewbit_s: Cold compile time, in seconds.
        budget_ratio, ratio: That within the budget and fewbit's over inductor's.
        pass_s: In fewbit's own passes, in seconds.
        share: Of the passes, against inductor's compile time.
        pass_s_per_layer: ``pass_s`` over the layers, in seconds.
    """

    layers: int
    repeats: int
    inductor_s: float
    budget_s: float
    fewbit_s: float
    budget_ratio: float
    ratio: float
    pass_s: float
    share: float
    pass_s_per_layer: float


@dataclass(frozen=True)
class Growth:
    """How the time in the passes grows from one number of layers to another: as layers ** exponent."""

    layers: int
    more_layers: int
    exponent: float

    @classmethod
    def between(cls, row: Row, larger: Row) -> Growth:
        """The exponent that the two rows have between them."""
        exponent = math.log(larger.pass_s / row.pass_s) / math.log(larger.layers / row.layers)
        return cls(row.layers, larger.layers, exponent)


def compile_in_this_process(settings: Settings, backend: str, layers: int) -> Compilation:
    """Compile once, in a process that has compiled no model so far."""
    torch.manual_seed(SEED)
    device = torch.device(settings.device)
    model = GPT(GPTConfig(layers=layers, width=settings.width, context=settings.context)).to(device)
    tokens = torch.randint(GPTConfig.vocabulary, (settings.batch, settings.context), device=device)
    chosen = backend_of(backend, recipe=settings.recipe, bits=settings.bits, strict=True)
    warm_up_the_compiler(device)
    compiled = torch.compile(model, backend=chosen, dynamic=False)
    # One call of the clock, without compare: a model is cold once in a process, so turns are processes (_turns).
    compile_s = clock_for(device)(lambda: compiled(tokens, tokens).backward(), 1)
    graphs = chosen.last_report().graphs if isinstance(chosen, FewBitBackend) else []
    coded = sum(not site.is_exact for graph in graphs for site in graph.sites)
    return Compilation(backend, layers, compile_s, sum((graph.pass_seconds for graph in graphs), 0.0), coded)


def compile_in_fresh_process(settings: Settings, backend: str, layers: int) -> Compilation:
    """The same, by a process with empty caches."""
    flags = [f"--{name}={value}" for name, value in asdict(settings).items()]
    with tempfile.TemporaryDirectory() as cache:
        found = in_fresh_process(
            "bench.compile_time",
            [*flags, f"--layers={layers}", f"--measure-compilation={backend}"],
            {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"},
        )
    return Compilation(**found)


def summarise(found: Sequence[Compilation]) -> list[Row]:
    """A row for each number of layers that all backends have compiled, the smallest first."""
    rows = []
    for layers in sorted({c.layers for c in found}):
        of_backend = {name: [c for c in found if (c.layers, c.backend) == (layers, name)] for name in BACKENDS}
        if all(of_backend.values()):
            rows.append(_row(layers, of_backend))
    return rows


def _row(layers: int, found: Mapping[str, Sequence[Compilation]]) -> Row:
    seconds = {name: statistics.median(c.compile_s for c in of_backend) for name, of_backend in found.items()}
    pass_s = statistics.median(c.pass_s for c in found[FEWBIT])
    return Row(
        layers,
        repeats=min(map(len, found.values())),
        inductor_s=seconds[INDUCTOR],
        budget_s=seconds[BUDGETED],
        fewbit_s=seconds[FEWBIT],
        budget_ratio=seconds[BUDGETED] / seconds[INDUCTOR],
        ratio=seconds[FEWBIT] / seconds[INDUCTOR],
        pass_s=pass_s,
        share=pass_s / seconds[INDUCTOR],
        pass_s_per_layer=pass_s / layers,
    )


def growths(rows: Sequence[Row]) -> list[Growth]:
    """From each row to the next, and from the first to the last where that is another pair."""
    pairs = list(pairwise(rows))
    if len(pairs) > 1:
        pairs.append((rows[0], rows[-1]))
    return [Growth.between(*pair) for pair in pairs]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, and show."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    try:
        settings = Settings(flags.width, flags.context, flags.batch, flags.recipe, flags.bits, flags.device.type)
    except ValueError as error:
        parser.error(str(error))
    if flags.measure_compilation:
        print(json.dumps(asdict(compile_in_this_process(settings, flags.measure_compilation, flags.layers[0]))))
        return
    notes = [f"{name} {value}" for name, value in asdict(settings).items()]
    command = Command.started("compile_time", arguments, flags, notes)
    turns, found = _turns(flags.repeats, flags.layers), []
    with command.progress(sum(layers for layers, _ in turns)) as show:
        for layers, backend in turns:
            show(f"{layers} layers, {backend}", sum(c.layers for c in found))
            found.append(compile_in_fresh_process(settings, backend, layers))
    rows = summarise(found)
    results = {
        "settings": asdict(settings),
        "rows": [asdict(row) for row in rows],
        "growths": [asdict(growth) for growth in growths(rows)],
        "compilations": [asdict(compilation) for compilation in found],
    }
    command.finish(_table(rows), results)


def _turns(repeats: int | None, layers: Sequence[int]) -> list[tuple[int, str]]:
    """All compilations in their order: round by round, the backend that begins alternating."""
    wanted = {n: repeats or (REPEATS_OF_A_LARGE_MODEL if n > LARGE else REPEATS) for n in sorted(layers)}
    return [
        (count, backend)
        for i in range(max(wanted.values()))
        for count in wanted
        if i < wanted[count]
        for backend in (BACKENDS if i % 2 == 0 else reversed(BACKENDS))
    ]


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("compile_time", __doc__)
    add_recipe(parser)
    add_bits(parser)
    add = parser.add_argument
    add(
        "--layers",
        nargs="+",
        type=count_flag,
        default=[2, 12, 48],
        metavar="N",
        help="numbers of layers (default 2 12 48)",
    )
    add("--width", type=count_flag, default=64, help="of the model, a multiple of 4 (default 64)")
    add("--context", type=count_flag, default=64, help="tokens in a sequence (default 64)")
    add("--batch", type=count_flag, default=2, help="sequences in a batch (default 2)")
    add(
        "--repeats",
        type=count_flag,
        help=f"compilations of which the median is taken (default {REPEATS}, "
        f"of models of more than {LARGE} layers {REPEATS_OF_A_LARGE_MODEL})",
    )
    add("--measure-compilation", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser


def _table(rows: Sequence[Row]) -> Table:
    exponents = ", ".join(f"{g.exponent:.2f} from {g.layers} to {g.more_layers}" for g in growths(rows))
    caption = f"time in the passes ~ layers ** e, e = {exponents}" if exponents else None
    table = Table(title="cold compilation of forward and backward", caption=caption)
    for heading in (
        "layers",
        "medians of",
        *TITLES.values(),
        "fewbit's passes",
        "of inductor's",
        "per layer",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.layers),
            str(row.repeats),
            f"{row.inductor_s:.1f} s",
            f"{row.budget_s:.1f} s (x {row.budget_ratio:.2f})",
            f"{row.fewbit_s:.1f} s (x {row.ratio:.2f})",
            f"{row.pass_s:.2f} s",
            f"{row.share:.1%}",
            f"{1e3 * row.pass_s_per_layer:.0f} ms",
        )
    return table


if __name__ == "__main__":
    main()
