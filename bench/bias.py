"""How wrong codes make a gradient on average, and how much they scatter it, against the noise between batches.

python -m bench.bias --models gpt llama vit

A model is trained for some steps exactly. Then its gradient is taken over several batches, exactly and with codes of
one class of sites at a time. Noise is how much exact gradients of batches scatter around their mean. What scatters less
than that slows training by little, and more batches average it away; bias, the mean error over batches, they do not.
Both are norms over all parameters, as shares of the noise. Graphs are partitioned, but no kernels are compiled.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bench.backends import NOTHING_CODED
from bench.bias_plot import save_plot
from bench.command import Command, count_flag, parser_of
from bench.corpus import Corpus
from bench.language_models import CONTEXT, LANGUAGE_MODELS, language_model
from bench.measure import flat_gradient
from bench.training import Batch, Runner
from bench.vit import ViT, ViTConfig
from fewbit_fx.config import ROUNDINGS, FewBitConfig
from fewbit_fx.dynamo.listener import Listener
from fewbit_fx.dynamo.partitioned_run import partitioned

MODELS = (*LANGUAGE_MODELS, "vit")
SEQUENCES, IMAGES, LAYERS, SEED = 4, 16, 2, 0
_CLASSES: dict[str, Callable[[int], dict[str, Any]]] = {
    "derivatives": lambda bits: {"derivatives": True, "bits": bits},
    "values": lambda bits: {"value_bits": bits},
    "norms": lambda bits: {"norm_bits": bits},
    "softmax": lambda bits: {"softmax_bits": bits},
}
_BITS = {"derivatives": (1, 2, 3, 4), "values": (4, 6, 8), "norms": (4, 6, 8), "softmax": (4, 6, 8)}
RECIPES = ("default", "lean")


@dataclass(frozen=True)
class Setting:
    """What is coded, and how.

    Attributes:
        sites: A class of sites, or the name of a recipe.
        bits: Of its codes; None for a recipe.
        rounding: The option.
        options: All options.
    """

    sites: str
    bits: int | None
    rounding: str
    options: dict[str, Any] = field(compare=False)

    @property
    def config(self) -> FewBitConfig:
        """The options of the backend."""
        return FewBitConfig(strict=True, rounding=self.rounding, **self.options)


@dataclass(frozen=True)
class Row:
    """The error of the gradient of one model by one setting.

    Attributes:
        model: Its name.
        sites, bits, rounding: The setting.
        bias: Norm of the mean error over batches, as a share of the noise; 0 where it cannot be told from it.
        scatter: Root mean square distance of the error from that mean, as a share of the noise.
        relative_error: Root mean square of the error over that of the gradient.
    """

    model: str
    sites: str
    bits: int | None
    rounding: str
    bias: float
    scatter: float
    relative_error: float


def settings() -> Iterator[Setting]:
    """Every class of sites at every number of bits, then the recipes, each with both roundings."""
    for rounding in ROUNDINGS:
        for sites, options in _CLASSES.items():
            for bits in _BITS[sites]:
                yield Setting(sites, bits, rounding, {**NOTHING_CODED, **options(bits)})
        for recipe in RECIPES:
            yield Setting(recipe, None, rounding, {"recipe": recipe})


def row_of(model: str, setting: Setting, exact: Tensor, coded: Tensor) -> Row:
    """Bias and scatter of the error.

    Args:
        model: The model's name.
        setting: How it was coded.
        exact: A gradient for each batch, shape (batches, parameters).
        coded: The same with codes.
    """
    count, error = len(exact), coded - exact
    noise = (exact - exact.mean(0)).square().sum() / (count - 1)
    power, of_mean = error.square().sum() / count, error.mean(0).square().sum()
    bias = ((count * of_mean - power) / (count - 1)).clamp(min=0)  # the mean of few has a share of the scatter too
    return Row(
        model,
        setting.sites,
        setting.bits,
        setting.rounding,
        bias=float((bias / noise).sqrt()),
        scatter=float(((power - bias) / noise).sqrt()),
        relative_error=math.sqrt(float(power / (exact.square().sum() / count))),
    )


class Subject:
    """A trained model, and batches that it is asked for gradients of."""

    def __init__(self, name: str, steps: int, batches: int) -> None:
        torch.compiler.reset()
        torch.manual_seed(SEED)
        generator = torch.Generator().manual_seed(SEED)
        self.name = name
        model, draw = _vit(generator) if name == "vit" else _language(name, generator)
        runner = Runner(name, model, "eager", draw, steps, SEED, torch.device("cpu"), torch.float32)
        runner.run(steps, lambda _: None)
        self._model = runner.model.eval()  # without dropout, whose noise is not of the batches
        self._batches = [draw() for _ in range(batches)]
        self.exact = self._gradients(self._model)

    def coded(self, setting: Setting) -> Tensor | None:
        """Gradients with codes, shape (batches, parameters); None where the setting codes nothing."""
        torch.compiler.reset()
        listener = Listener()
        found = self._gradients(partitioned(self._model, setting.config, listener))
        coded = any(site.relative_error > 0 for record in listener.records for site in record.sites)
        return found if coded else None

    def _gradients(self, run: Callable[..., Tensor]) -> Tensor:
        found = []
        for i, batch in enumerate(self._batches):
            self._model.zero_grad(set_to_none=True)
            torch.manual_seed(i)
            run(*batch).backward()
            found.append(flat_gradient(self._model).float())
        return torch.stack(found)


def _language(name: str, generator: torch.Generator) -> tuple[nn.Module, Callable[[], Batch]]:
    corpus = Corpus.of_standard_library()
    return language_model(name, lora=False, layers=LAYERS), lambda: corpus.batch(SEQUENCES, CONTEXT, generator)


def _vit(generator: torch.Generator) -> tuple[nn.Module, Callable[[], Batch]]:
    """Images are one of ten patterns and twice as much noise."""
    config = ViTConfig(layers=LAYERS)
    shape = (config.channels, config.image_size, config.image_size)
    patterns = torch.randn(config.classes, *shape, generator=generator)

    def draw() -> Batch:
        classes = torch.randint(config.classes, (IMAGES,), generator=generator)
        return patterns[classes] + 2 * torch.randn(IMAGES, *shape, generator=generator), classes

    return ViT(config), draw


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, and show."""
    parser = parser_of("bias", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help=f"default {' '.join(MODELS)}")
    parser.add_argument("--steps", type=count_flag, default=100, help="of exact training before (default 100)")
    parser.add_argument("--batches", type=count_flag, default=12, help="that gradients are taken of (default 12)")
    flags = parser.parse_args(arguments)
    if flags.batches < 2:
        parser.error(f"--batches {flags.batches}: allowed is 2 or more, for noise is between batches")
    notes = [f"{flags.steps} steps", f"{flags.batches} batches", f"{LAYERS} layers", "float32"]
    command = Command.started("bias", arguments, flags, notes)
    rows = _rows(flags, command)
    command.finish(_table(rows), {"rows": [asdict(row) for row in rows]})
    save_plot(command.output.with_suffix(".png"), [asdict(row) for row in rows], command.about)


def _rows(flags: argparse.Namespace, command: Command) -> list[Row]:
    chosen, rows = list(settings()), []
    with command.progress(len(flags.models) * len(chosen)) as show:
        for i, name in enumerate(flags.models):
            show(f"{name}, training", i * len(chosen))
            subject = Subject(name, flags.steps, flags.batches)
            for j, setting in enumerate(chosen):
                show(f"{name}, {setting.sites}", i * len(chosen) + j)
                coded = subject.coded(setting)
                if coded is not None:
                    rows.append(row_of(name, setting, subject.exact, coded))
    return rows


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="error of the gradient, as shares of the noise between batches")
    for heading in ("model", "sites", "bits", *(f"{r}: {what}" for r in ROUNDINGS for what in ("bias", "scatter"))):
        table.add_column(heading)
    cases = {(row.model, row.sites, row.bits, row.rounding): row for row in rows}
    for model, sites, bits in dict.fromkeys(key[:3] for key in cases):
        pair = [cases.get((model, sites, bits, rounding)) for rounding in ROUNDINGS]
        cells = [f"{100 * share:.2f} %" for row in pair if row for share in (row.bias, row.scatter)]
        table.add_row(model, sites, str(bits or ""), *cells)
    return table


if __name__ == "__main__":
    main()
