"""Time whole training steps under inductor, inductor's own leaner cut and fewbit, and measure their memory.

python -m bench.step --model roberta --batch 8

A step: forward, backward, AdamW, zero_grad. The backends take turns in one process. Memory is of a
fresh process for each backend: the bytes held between a forward and its backward, and the peak of a
step that the allocator reports, on CUDA with weights, gradients and AdamW's state.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

from bench.backends import BACKENDS, BUDGETED, FEWBIT, INDUCTOR, TITLES, Backend, backend_of, saved_bytes_within_budget
from bench.command import (
    DTYPES,
    Command,
    add_bits,
    add_recipe,
    count_flag,
    parser_of,
    seconds_flag,
)
from bench.comparison import CAPTION, changes, mebibytes, times
from bench.corpus import Corpus
from bench.language_models import CONTEXT, LANGUAGE_MODELS, LAYERS, language_model
from bench.measure import Memory, what_happened
from bench.timing import Timing, clock_for, compare
from bench.training import Batch, autocast
from bench.vit import ViT, ViTConfig

MODELS = (*LANGUAGE_MODELS, "vit", "roberta")
BATCHES = 8  # taken in turn
LEARNING_RATE = 1e-4
SEED = 0
IMAGE_TOKENS = 1 + ViTConfig().patches


@dataclass(frozen=True)
class Sizes:
    """Sizes that suit a model and a device: layers, sequences or images in a batch, tokens in a sequence."""

    layers: int
    batch: int
    sequence: int


SIZES = {
    **{(name, device): Sizes(LAYERS, 4, CONTEXT) for name in LANGUAGE_MODELS for device in ("cpu", "cuda")},
    ("vit", "cpu"): Sizes(ViTConfig.layers, 4, IMAGE_TOKENS),
    ("vit", "cuda"): Sizes(ViTConfig.layers, 128, IMAGE_TOKENS),
    ("roberta", "cpu"): Sizes(12, 2, 64),
    ("roberta", "cuda"): Sizes(12, 128, 128),
}


@dataclass(frozen=True)
class Settings:
    """What is trained and how, every default resolved.

    Attributes:
        model: ``gpt`` or ``llama`` (the demo's), ``vit`` or ``roberta`` (roberta-base).
        layers: Of the model.
        batch: Sequences in a batch, or images.
        sequence: Tokens in a sequence; those of an image are given.
        recipe: Of fewbit.
        bits: Bits per coded element.
        dtype: float32, or the dtype to autocast to.
        lora: Train only low-rank adapters on the attention of a language model.
        device: cpu or cuda.
    """

    model: str
    layers: int
    batch: int
    sequence: int
    recipe: str
    bits: int
    dtype: str
    lora: bool
    device: str

    def __post_init__(self) -> None:
        if self.lora and self.model not in LANGUAGE_MODELS:
            raise ValueError(f"--lora is of the model {' or '.join(LANGUAGE_MODELS)}, not of {self.model}")
        if self.model == "vit" and self.sequence != IMAGE_TOKENS:
            raise ValueError(f"--sequence {self.sequence}: an image of vit has {IMAGE_TOKENS} tokens")
        if self.model == "roberta":
            from bench.roberta import LONGEST

            if self.sequence > LONGEST:
                raise ValueError(f"--sequence {self.sequence}: roberta takes at most {LONGEST} tokens")

    @classmethod
    def of(cls, flags: argparse.Namespace) -> Settings:
        """The settings that the flags ask for. Raises ValueError where they do not go together."""
        device = flags.device.type
        default = SIZES[flags.model, device]
        return cls(
            model=flags.model,
            layers=flags.layers or default.layers,
            batch=flags.batch or default.batch,
            sequence=flags.sequence or default.sequence,
            recipe=flags.recipe,
            bits=flags.bits,
            dtype=flags.dtype or ("bfloat16" if device == "cuda" else "float32"),
            lora=flags.lora,
            device=device,
        )

    def to_flags(self) -> list[str]:
        """The command line that gives these settings."""
        values = {name: value for name, value in asdict(self).items() if name != "lora"}
        return [f"--{name}={value}" for name, value in values.items()] + ["--lora"] * self.lora

    def initial_model(self) -> nn.Module:
        """The model at its seed's initial weights: a batch in, the loss out."""
        torch.manual_seed(SEED)
        return self._random_model().to(self.device)

    def _random_model(self) -> nn.Module:
        if self.model in LANGUAGE_MODELS:
            return language_model(self.model, self.lora, self.layers, self.sequence)
        if self.model == "vit":
            return ViT(ViTConfig(layers=self.layers))
        from bench.roberta import RobertaClassifier  # transformers takes seconds to import

        return RobertaClassifier(self.layers)

    def backend(self, name: str) -> Backend:
        """A backend of that name."""
        return backend_of(name, recipe=self.recipe, bits=self.bits, strict=True)

    def batches(self) -> list[Batch]:
        """Real text and the bytes that follow for language models; else random images or tokens, and classes."""
        generator = torch.Generator().manual_seed(SEED)
        if self.model in LANGUAGE_MODELS:
            corpus = Corpus.of_standard_library()
            drawn = [corpus.batch(self.batch, self.sequence, generator) for _ in range(BATCHES)]
        else:
            drawn = [self._random_batch(generator) for _ in range(BATCHES)]
        return [(inputs.to(self.device), targets.to(self.device)) for inputs, targets in drawn]

    def _random_batch(self, generator: torch.Generator) -> Batch:
        if self.model == "vit":
            shape = self.batch, ViTConfig.channels, ViTConfig.image_size, ViTConfig.image_size
            return torch.randn(shape, generator=generator), self._random_classes(ViTConfig.classes, generator)
        from bench.roberta import CONFIG, FIRST_WORD

        tokens = torch.randint(FIRST_WORD, CONFIG.vocab_size, (self.batch, self.sequence), generator=generator)
        return tokens, self._random_classes(CONFIG.num_labels, generator)

    def _random_classes(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(count, (self.batch,), generator=generator)


class Step:
    """Training steps of a model that a backend compiles; each call takes one, on the next batch."""

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self.model = settings.initial_model()
        self._compiled = torch.compile(self.model, backend=backend, dynamic=False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        self._batches = itertools.cycle(settings.batches())
        self._autocast = torch.device(settings.device), getattr(torch, settings.dtype)

    def __call__(self) -> None:
        self.forward().backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def forward(self) -> Tensor:
        """The loss of the next batch."""
        with autocast(*self._autocast):
            return self._compiled(*next(self._batches))

    def saved_bytes_within_budget(self) -> int:
        """What inductor's leaner cut saves for the backward, without parameters."""
        with autocast(*self._autocast):
            return saved_bytes_within_budget(self.model, next(self._batches))


def memory_in_this_process(settings: Settings, backend: str) -> Memory:
    """Memory of training with a backend, in a process that has compiled no model so far."""
    step = Step(settings, settings.backend(backend))
    return Memory.of_training(step, step.forward, torch.device(settings.device))


@dataclass
class Results:
    """What has been measured so far, by backend.

    Attributes:
        saved_bytes: Saved for the backward by the graphs, without parameters.
        sites: What fewbit did, each kind of site once.
        timings: Of a step; the ratio is to inductor.
        memory: In fresh processes.
    """

    saved_bytes: Mapping[str, int]
    sites: tuple[str, ...]
    timings: Mapping[str, Timing]
    memory: dict[str, Memory]


def measure(settings: Settings, command: Command, seconds: float, memory: bool) -> Results:
    """Time steps for so many seconds, then measure memory; Ctrl-C leaves out what is not there yet."""
    results = Results({}, (), {}, {})
    with command.progress(1 + len(BACKENDS) * memory) as show:
        show("compiling", 0)
        backends = {name: settings.backend(name) for name in BACKENDS}
        steps = {name: Step(settings, backend) for name, backend in backends.items()}
        results.timings = compare(
            steps, clock=clock_for(command.device), seconds=seconds, advance=lambda share: show("taking steps", share)
        )
        report = backends[FEWBIT].last_report()
        results.saved_bytes = {
            INDUCTOR: report.plain_bytes,
            BUDGETED: steps[BUDGETED].saved_bytes_within_budget(),
            FEWBIT: report.fewbit_bytes,
        }
        results.sites = what_happened(report)
        del steps
        for i, name in enumerate(BACKENDS if memory else (), 1):
            show(f"measuring memory in a fresh process: {TITLES[name]}", i)
            results.memory[name] = Memory.in_fresh_process("bench.step", settings.to_flags(), name)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, and show."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    try:
        settings = Settings.of(flags)
    except ValueError as error:
        parser.error(str(error))
    if flags.measure_memory:
        print(json.dumps(asdict(memory_in_this_process(settings, flags.measure_memory))))
        return
    notes = [f"{name} {value}" for name, value in asdict(settings).items()]
    command = Command.started("step", arguments, flags, notes)
    results = measure(settings, command, flags.seconds, flags.memory)
    command.finish(_table(results), {"settings": asdict(settings), "results": asdict(results)})


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("step", __doc__)
    add_recipe(parser)
    add_bits(parser)
    add, on_cuda = parser.add_argument, SIZES["roberta", "cuda"]
    add(
        "--model", choices=MODELS, default="gpt", help="the demo's, a vision transformer, or roberta-base (default gpt)"
    )
    add("--layers", type=count_flag, help=f"of the model (default {LAYERS}, of roberta 12)")
    add(
        "--batch",
        type=count_flag,
        help=f"sequences or images in a batch (default 4, 2 of roberta; on cuda {on_cuda.batch} of vit and roberta)",
    )
    add(
        "--sequence",
        type=count_flag,
        help=f"tokens in a sequence (default {CONTEXT}, 64 of roberta, on cuda {on_cuda.sequence}; not of vit)",
    )
    add("--dtype", choices=DTYPES, help="bfloat16: autocast (default float32 on cpu, bfloat16 on cuda)")
    add("--lora", action="store_true", help="train only low-rank adapters on the attention of gpt or llama")
    add("--seconds", type=seconds_flag, default=60.0, help="of timing (default 60)")
    add("--no-memory", dest="memory", action="store_false", help="only time; start no processes to measure memory")
    add("--measure-memory", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser


def _table(results: Results) -> Table:
    table = Table("", *(TITLES[name] for name in BACKENDS), title="training steps", caption=CAPTION)
    for title, cells in _rows(results):
        table.add_row(title, *cells)
    return table


def _rows(results: Results) -> Iterator[tuple[str, list[str]]]:
    held = {name: memory.held_bytes for name, memory in results.memory.items()}
    peak = {name: memory.peak_bytes for name, memory in results.memory.items()}
    for title, values in (
        ("saved for backward by the graphs", results.saved_bytes),
        ("held after a forward (allocator)", held),
        ("peak of a step (allocator)", peak),
    ):
        if values:
            yield title, changes([values.get(name) for name in BACKENDS], mebibytes)
    if results.timings:
        yield "median step, ms", times([results.timings[name] for name in BACKENDS])


if __name__ == "__main__":
    main()
