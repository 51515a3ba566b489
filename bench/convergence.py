"""Train a model under several recipes and seeds, and compare the final validation losses.

python -m bench.convergence --model llama --seeds 3

A seed decides initial weights, batches and dropout, alike for every recipe. "inductor" is torch.compile's default.
Whether a recipe trains as well is read off the spread of the seeds: its mean should lie within it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.table import Table

from bench.backends import FEWBIT, INDUCTOR, backend_of
from bench.command import DTYPES, Command, count_flag, parser_of
from bench.corpus import Corpus
from bench.language_models import CONTEXT, LANGUAGE_MODELS, language_model
from bench.training import Runner
from fewbit_fx.config import RECIPES

BATCH = 4


@dataclass(frozen=True)
class Training:
    """One run.

    Attributes:
        recipe: Of fewbit, or ``inductor``.
        seed: Of weights, batches and dropout.
        validation_loss: After the last step, in nats per byte.
    """

    recipe: str
    seed: int
    validation_loss: float


def train(model: str, recipe: str, seed: int, steps: int, dtype: torch.dtype, device: torch.device) -> Training:
    """Train once, from the seed's initial weights."""
    torch.compiler.reset()
    torch.manual_seed(seed)
    made = language_model(model, lora=False).to(device)
    corpus, generator = Corpus.of_standard_library(), torch.Generator().manual_seed(seed)
    runner = Runner(
        recipe,
        made,
        backend=INDUCTOR if recipe == INDUCTOR else backend_of(FEWBIT, recipe=recipe),
        batches=lambda: corpus.batch(BATCH, CONTEXT, generator),
        steps=steps,
        seed=seed + 1,
        device=device,
        dtype=dtype,
    )
    runner.run(steps, lambda _: None)
    return Training(recipe, seed, runner.validate(corpus.validation_batches(2 * BATCH, CONTEXT, 8)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, train, and show."""
    parser = parser_of("convergence", __doc__)
    parser.add_argument("--model", choices=LANGUAGE_MODELS, default="gpt", help="default gpt")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["default", "lean"], help="default, lean")
    parser.add_argument("--seeds", type=count_flag, default=3, help="so many, from 0 on (default 3)")
    parser.add_argument("--steps", type=count_flag, default=400, help="of each training (default 400)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16: autocast")
    flags = parser.parse_args(arguments)
    notes = [f"{name} {getattr(flags, name)}" for name in ("model", "steps", "dtype")] + [f"batch {BATCH}"]
    command = Command.started("convergence", arguments, flags, notes)
    runs = _runs(flags, command)
    command.finish(_table(runs), {"runs": [asdict(run) for run in runs]})


def _runs(flags: argparse.Namespace, command: Command) -> list[Training]:
    cases = [(recipe, seed) for seed in range(flags.seeds) for recipe in (INDUCTOR, *flags.recipes)]
    runs: list[Training] = []
    with command.progress(len(cases)) as show:
        for i, (recipe, seed) in enumerate(cases):
            show(f"{recipe}, seed {seed}", i)
            runs.append(train(flags.model, recipe, seed, flags.steps, getattr(torch, flags.dtype), command.device))
    return runs


def _table(runs: Sequence[Training]) -> Table:
    table = Table(title="validation loss after the last step, nats per byte")
    for heading in ("", "mean", "least", "most", "mean against inductor"):
        table.add_column(heading)
    losses = {
        name: [r.validation_loss for r in runs if r.recipe == name] for name in dict.fromkeys(r.recipe for r in runs)
    }
    plain = statistics.mean(losses[INDUCTOR])
    for name, values in losses.items():
        mean = statistics.mean(values)
        cells = [f"{value:.4f}" for value in (mean, min(values), max(values))]
        table.add_row(name, *cells, f"{100 * (mean / plain - 1):+.2f} %")
    return table


if __name__ == "__main__":
    main()
