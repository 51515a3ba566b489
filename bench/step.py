"""Time whole training steps under fewbit and under inductor, and measure their memory.

python -m bench.step --model roberta --batch 8

A step: forward, backward, AdamW, zero_grad. Both backends take turns in one process. Memory is of a
fresh process for each backend: on CUDA the peak of a step that the allocator reports, with weights,
gradients and AdamW's state; on both devices the bytes held between a forward and its backward.
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
from bench.corpus import Corpus
from bench.gpt import GPT, GPTConfig
from bench.measure import Memory, what_happened
from bench.timing import Timing, clock_for, compare
from bench.training import Batch, autocast

BACKENDS = ("inductor", "fewbit")
BATCHES = 8  # taken in turn
LEARNING_RATE = 1e-4
LORA_RANK = 8
SEED = 0


@dataclass(frozen=True)
class Sizes:
    """Sizes that suit a model and a device: layers, sequences in a batch, tokens in a sequence."""

    layers: int
    batch: int
    sequence: int


SIZES = {
    ("gpt", "cpu"): Sizes(GPTConfig.layers, 4, GPTConfig.context),
    ("gpt", "cuda"): Sizes(GPTConfig.layers, 4, GPTConfig.context),
    ("roberta", "cpu"): Sizes(12, 2, 64),
    ("roberta", "cuda"): Sizes(12, 128, 128),
}


@dataclass(frozen=True)
class Settings:
    """What is trained and how, every default resolved.

    Attributes:
        model: ``gpt`` (the demo's) or ``roberta`` (roberta-base).
        layers: Of the model.
        batch: Sequences in a batch.
        sequence: Tokens in a sequence.
        bits: Bits per coded element.
        dtype: float32, or the dtype to autocast to.
        lora: Train only low-rank adapters on the attention of ``gpt``.
        device: cpu or cuda.
    """

    model: str
    layers: int
    batch: int
    sequence: int
    bits: int
    dtype: str
    lora: bool
    device: str

    def __post_init__(self) -> None:
        if self.lora and self.model != "gpt":
            raise ValueError(f"--lora is of the model gpt, not of {self.model}")
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
        if self.model == "gpt":
            rank = LORA_RANK if self.lora else 0
            return GPT(GPTConfig(layers=self.layers, context=self.sequence, lora_rank=rank)).to(self.device)
        from bench.roberta import RobertaClassifier  # transformers takes seconds to import

        return RobertaClassifier(self.layers).to(self.device)

    def batches(self) -> list[Batch]:
        """Real text and the bytes that follow for gpt; random tokens and classes for roberta."""
        generator = torch.Generator().manual_seed(SEED)
        if self.model == "gpt":
            corpus = Corpus.of_standard_library()
            drawn = [corpus.batch(self.batch, self.sequence, generator) for _ in range(BATCHES)]
        else:
            drawn = [self._random_batch(generator) for _ in range(BATCHES)]
        return [(inputs.to(self.device), targets.to(self.device)) for inputs, targets in drawn]

    def _random_batch(self, generator: torch.Generator) -> Batch:
        from bench.roberta import CONFIG, FIRST_WORD

        tokens = torch.randint(FIRST_WORD, CONFIG.vocab_size, (self.batch, self.sequence), generator=generator)
        return tokens, torch.randint(CONFIG.num_labels, (self.batch,), generator=generator)


class Step:
    """Training steps of a model that a backend compiles; each call takes one, on the next batch."""

    def __init__(self, settings: Settings, backend: str | fewbit_fx.FewBitBackend) -> None:
        model = settings.initial_model()
        self._compiled = torch.compile(model, backend=backend, dynamic=False)
        trained = [p for p in model.parameters() if p.requires_grad]
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


def memory_in_this_process(settings: Settings, backend: str) -> Memory:
    """Memory of training with a backend, in a process that has compiled no model so far."""
    step = Step(settings, fewbit_fx.backend(bits=settings.bits, strict=True) if backend == "fewbit" else backend)
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
        backend = fewbit_fx.backend(bits=settings.bits, strict=True)
        steps = {"inductor": Step(settings, "inductor"), "fewbit": Step(settings, backend)}
        results.timings = compare(
            steps, clock=clock_for(command.device), seconds=seconds, advance=lambda share: show("taking steps", share)
        )
        report = backend.last_report()
        results.saved_bytes = {"inductor": report.plain_bytes, "fewbit": report.fewbit_bytes}
        results.sites = what_happened(report)
        del steps
        for i, name in enumerate(BACKENDS if memory else (), 1):
            show(f"measuring memory in a fresh process: {name}", i)
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
    add_bits(parser)
    add, on_cuda = parser.add_argument, SIZES["roberta", "cuda"]
    add("--model", choices=["gpt", "roberta"], default="gpt", help="the demo's, or roberta-base (default gpt)")
    add("--layers", type=count_flag, help="of the model (default 4 of gpt, 12 of roberta)")
    add(
        "--batch",
        type=count_flag,
        help=f"sequences in a batch (default 4 of gpt, 2 of roberta, on cuda {on_cuda.batch})",
    )
    add(
        "--sequence",
        type=count_flag,
        help=f"tokens in a sequence (default 256 of gpt, 64 of roberta, on cuda {on_cuda.sequence})",
    )
    add("--dtype", choices=DTYPES, help="bfloat16: autocast (default float32 on cpu, bfloat16 on cuda)")
    add("--lora", action="store_true", help="train only low-rank adapters on the attention of gpt")
    add("--seconds", type=seconds_flag, default=60.0, help="of timing (default 60)")
    add("--no-memory", dest="memory", action="store_false", help="only time; start no processes to measure memory")
    add("--measure-memory", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser


def _table(results: Results) -> Table:
    table = Table("", *BACKENDS, "fewbit against inductor", title="training steps", caption=_CAPTION)
    for cells in _rows(results):
        table.add_row(*cells)
    return table


_CAPTION = "±: half the distance of the quartiles"


def _rows(results: Results) -> Iterator[tuple[str, str, str, str]]:
    held = {name: memory.held_bytes for name, memory in results.memory.items()}
    peak = {name: memory.peak_bytes for name, memory in results.memory.items() if memory.peak_bytes is not None}
    for title, values in (
        ("saved for backward by the graphs", results.saved_bytes),
        ("held after a forward (allocator)", held),
        ("peak of a step (CUDA allocator)", peak),
    ):
        if len(values) == len(BACKENDS):
            plain, fewbit = (values[name] for name in BACKENDS)
            yield title, f"{plain / MiB:.1f} MiB", f"{fewbit / MiB:.1f} MiB", change(fewbit, plain)
    if results.timings:
        timing, other = (results.timings[name] for name in BACKENDS)
        yield "median step, ms", milliseconds(timing), milliseconds(other), f"x {other.ratio:.3f}"


if __name__ == "__main__":
    main()
