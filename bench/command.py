"""What the benchmark commands share: their flags, a progress bar that Ctrl-C ends, tables and files."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fewbit_fx
from bench.measure import conditions
from bench.timing import Timing
from fewbit_fx.config import RECIPES

MiB = 2**20
DTYPES = ("float32", "bfloat16")
_WIDTH_OF_A_FILE = 180  # columns, where the output is no terminal


@dataclass(frozen=True)
class Command:
    """One run of a benchmark command.

    Attributes:
        name: As in ``python -m bench.name``.
        arguments: The flags as given.
        output: PATH of PATH.json.
        device: What is measured.
        console: Where to show.
        about: The conditions when it started.
    """

    name: str
    arguments: Sequence[str]
    output: Path
    device: torch.device
    console: Console
    about: Mapping[str, str]

    @classmethod
    def started(
        cls, name: str, arguments: Sequence[str] | None, flags: argparse.Namespace, notes: Iterable[str]
    ) -> Command:
        """The command that was given these arguments, or None for those of the process.

        Args:
            name: As in ``python -m bench.name``.
            arguments: The command line.
            flags: The same, parsed.
            notes: The settings, such as ``bits 3``.
        """
        given = sys.argv[1:] if arguments is None else arguments
        console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)
        return cls(name, given, flags.output, flags.device, console, conditions(flags.device, notes))

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str, float], None]]:
        """A bar to be called with what is being done and how many of ``total`` are done.

        Ctrl-C leaves the block, and the command goes on with what there is.
        """
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %")
        with Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True) as bar:
            task = bar.add_task("", total=total)
            try:
                yield lambda doing, done: bar.update(task, description=doing, completed=done)
            except KeyboardInterrupt:
                self.console.print("[yellow]interrupted; this is what there is so far[/]")

    def finish(self, table: Table, results: Mapping[str, Any]) -> None:
        """Print the table, the conditions beneath it, and write PATH.json with the results, these and the command."""
        line = shlex.join(["python", "-m", f"bench.{self.name}", *self.arguments])
        path = self.output.with_suffix(".json")
        path.write_text(json.dumps({"command": line, "conditions": self.about, **results}, indent=1) + "\n")
        self.console.print(table)
        self.console.print("  ".join(f"[dim]{k}:[/] {v}" for k, v in self.about.items()))
        self.console.print(f"wrote {path} by [bold]{line}[/]")


def parser_of(name: str, description: str | None, output: str = "PATH.json") -> argparse.ArgumentParser:
    """A parser with the flags of every command: --device and --output, which help calls what is given."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"bench.{name}", description=description, formatter_class=formatter)
    parser.add_argument(
        "--device", type=device_flag, default=torch.device("cpu"), help="cpu or cuda (default cpu)", metavar="DEVICE"
    )
    parser.add_argument(
        "--output", type=output_flag, default=Path(name), help=f"{output} (default {name})", metavar="PATH"
    )
    return parser


def add_bits(parser: argparse.ArgumentParser) -> None:
    """The flag --bits, of one number."""
    parser.add_argument("--bits", type=bits_flag, default=3, help="bits per coded element, 1 to 8 (default 3)")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The flag --recipe, of one name."""
    default = fewbit_fx.FewBitConfig.recipe
    parser.add_argument("--recipe", choices=RECIPES, default=default, help=f"of fewbit (default {default})")


def bits_flag(text: str) -> int:
    """A number of bits that fewbit takes."""
    try:
        return fewbit_fx.FewBitConfig(bits=int(text)).bits
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count_flag(text: str) -> int:
    """A whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed is a whole number, at least 1")
    return int(text)


def whole_flag(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; allowed is a whole number, 0 or more")
    return int(text)


def seconds_flag(text: str) -> float:
    """A time in seconds, above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}; allowed is a number of seconds above 0")


def device_flag(text: str) -> torch.device:
    """A device that this machine has."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed is cpu or cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("'cuda', but torch finds no CUDA device; allowed here is cpu")
    return torch.device(text)


def output_flag(text: str) -> Path:
    """A path in a folder that exists: it is written to only after minutes."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}; there is no folder {str(path.parent)!r}")
    return path


def milliseconds(timing: Timing) -> str:
    """The median and half the distance of the quartiles, such as ``1.23 ±4%``."""
    value = 1e3 * timing.median_s
    return f"{value:.0f} ±{timing.spread:.0%}" if value >= 100 else f"{value:#.3g} ±{timing.spread:.0%}"


def change(value: float, reference: float) -> str:
    """By which share a value differs, such as ``-23.7%``."""
    return f"{value / reference - 1:+.1%}"
