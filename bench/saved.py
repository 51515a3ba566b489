"""What is saved for the backward of architectures that people train, under inductor and under fewbit's recipes.

python -m bench.saved --only Llama-3 ViT

Nothing is compiled to kernels: the graphs are cut, rewritten and run by plain ATen operations. Each recipe is compared
with inductor at its default and with ``activation_memory_budget=0.9``, and its first gradient, at random weights, with
that of the recipe "exact": also in float32, where codes alone make a difference. Needs transformers; diffusion models
need diffusers, LoRA peft (--only leaves them out).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx

import fewbit_fx
from bench.architectures import Architecture, architectures, quiet_libraries
from bench.backends import BUDGET, within_budget
from bench.command import DTYPES, Command, change, parser_of
from bench.comparison import mebibytes
from bench.measure import flat_gradient, relative_error
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.passes.record import GraphRecord
from fewbit_fx.torch_private.inductor import partition_only

RECIPES = ("exact", "default", "lean")
SEED = 0


@dataclass(frozen=True)
class Case:
    """One recipe on one architecture.

    Attributes:
        saved_bytes: Saved for the backward, without parameters.
        gradient_error: Of the first gradient, relative to that of the recipe "exact".
        codes_error: The same in float32: of codes alone. In 16 bits all that follows from one is rounded otherwise too.
        loss_identical: Whether the loss is bit for bit that of the recipe "exact".
    """

    saved_bytes: int
    gradient_error: float
    codes_error: float
    loss_identical: bool


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        name: Such as ``Llama-3``.
        group: ``transformer``, ``other`` or ``lora``.
        inductor_bytes: Saved by torch.compile's own cut.
        budget_bytes: The same with ``activation_memory_budget=0.9``.
        recipes: By name.
    """

    name: str
    group: str
    inductor_bytes: int
    budget_bytes: int
    recipes: dict[str, Case]


def measure(architecture: Architecture, dtype: torch.dtype) -> Row:
    """All cases of one architecture."""
    with within_budget():
        budget = _run(architecture, dtype, fewbit_fx.FewBitConfig(disable=("find",), recipe="derivatives"))
    runs = _runs(architecture, dtype)
    exact, errors = runs["exact"], _errors(runs)
    by_codes = errors if dtype == torch.float32 else _errors(_runs(architecture, torch.float32))
    cases = {
        recipe: Case(run.saved_bytes, errors[recipe], by_codes[recipe], torch.equal(run.loss, exact.loss))
        for recipe, run in runs.items()
    }
    return Row(architecture.name, architecture.group, exact.inductor_bytes, budget.saved_bytes, cases)


def _runs(architecture: Architecture, dtype: torch.dtype) -> dict[str, _Run]:
    return {recipe: _run(architecture, dtype, fewbit_fx.FewBitConfig(recipe=recipe)) for recipe in RECIPES}


def _errors(runs: Mapping[str, _Run]) -> dict[str, float]:
    return {recipe: relative_error(run.gradient, runs["exact"].gradient) for recipe, run in runs.items()}


@dataclass(frozen=True)
class _Run:
    """One forward and backward: bytes saved by torch.compile's own cut and by the one in use, and what came of it."""

    inductor_bytes: int
    saved_bytes: int
    gradient: Tensor
    loss: Tensor


def _run(architecture: Architecture, dtype: torch.dtype, config: fewbit_fx.FewBitConfig) -> _Run:
    torch.compiler.reset()
    torch.manual_seed(SEED)
    example = architecture.build().of(dtype)
    records: list[GraphRecord] = []

    def backend(gm: fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        return partition_only(gm, given, FewBitPartitioner(config, records.append))

    torch.manual_seed(SEED + 1)
    loss = torch.compile(lambda **inputs: example.loss(example.model(**inputs)), backend=backend)(**example.inputs)
    loss.backward()
    plain, saved = (sum(getattr(record, name) for record in records) for name in ("plain_bytes", "fewbit_bytes"))
    return _Run(plain, saved, flat_gradient(example.model), loss.detach())


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, and show."""
    names = [architecture.name for architecture in architectures()]
    parser = parser_of("saved", __doc__)
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and data (default bfloat16)")
    flags = parser.parse_args(arguments)
    command = Command.started("saved", arguments, flags, [f"dtype {flags.dtype}", "batch 2"])
    quiet_libraries()
    rows = _rows(flags, command)
    command.finish(_table(rows), {"rows": [asdict(row) for row in rows]})


def _rows(flags: argparse.Namespace, command: Command) -> list[Row]:
    chosen = [architecture for architecture in architectures() if architecture.name in flags.only]
    rows: list[Row] = []
    with command.progress(len(chosen)) as show:
        for i, architecture in enumerate(chosen):
            show(architecture.name, i)
            rows.append(measure(architecture, getattr(torch, flags.dtype)))
    return rows


def _table(rows: Sequence[Row]) -> Table:
    caption = "of bytes saved by inductor's default (and by its budget 0.9); error of the first gradient by codes alone"
    table = Table("", "inductor", f"budget {BUDGET}", *RECIPES, title="saved for the backward", caption=caption)
    for row in rows:
        cells = [f"{change(case.saved_bytes, row.inductor_bytes)}{_more(row, case)}" for case in row.recipes.values()]
        table.add_row(
            row.name,
            mebibytes(row.inductor_bytes),
            change(row.budget_bytes, row.inductor_bytes),
            *cells,
        )
    return table


def _more(row: Row, case: Case) -> str:
    differs = "" if case.loss_identical else ", the loss differs"
    return f" ({change(case.saved_bytes, row.budget_bytes)}), {case.codes_error:.1%}{differs}"


if __name__ == "__main__":
    main()
