"""The command line: ``python -m fewbit_fx codebook``, ``bisect`` and ``env``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fewbit_fx.codebooks.activations import activation, derivative_of
from fewbit_fx.codebooks.density import Density, parse_density
from fewbit_fx.codebooks.fitting import Codebook, gray_code
from fewbit_fx.codebooks.of_functions import codebook
from fewbit_fx.codebooks.sampling import Sample, sample_derivative
from fewbit_fx.dynamo.bisector import bisect
from fewbit_fx.environment import describe_environment
from fewbit_fx.reporting.text_table import text_table


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m fewbit_fx", description="Few-bit saved tensors for torch.compile.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    show = commands.add_parser("codebook", help="print the optimal codebook of an activation's derivative")
    show.add_argument("function", help="name of an activation, such as gelu")
    show.add_argument("--bits", type=int, default=3, help="bits per code, 1 to 8 (default 3)")
    show.add_argument(
        "--density",
        default="uniform",
        help="of x: uniform (default: where f' varies), uniform:LOW,HIGH, normal:MEAN,STD, typical (what the "
        "backend assumes), or a .npy or .pt file of pre-activations",
    )
    show.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the derivative, its levels and the error")
    commands.add_parser("env", help="print versions, devices and options, for a bug report")
    halve = commands.add_parser("bisect", help="find the sites whose codes make a check of yours fail")
    halve.add_argument(
        "check",
        metavar="MODULE:FUNCTION",
        help="a function that takes a fewbit backend, compiles a fresh model with it, runs it, and returns whether "
        "the result is good",
    )
    options = parser.parse_args(arguments)
    if options.command == "bisect":
        _bisect(options.check)
        return
    if options.command == "env":
        print("\n".join(f"{name:30} {value}" for name, value in describe_environment()))
        return
    try:
        _show_codebook(options.function, options.bits, parse_density(options.density), options.plot)
    except (ValueError, TypeError, OSError) as mistake:  # OSError: the file to plot to
        sys.exit(f"fewbit_fx: {mistake}")


def _bisect(check: str) -> None:
    module, _, name = check.partition(":")
    sys.path.insert(0, "")  # a script beside the caller, as ``python -m`` finds it
    try:
        function = getattr(importlib.import_module(module), name)
        print(bisect(function, progress=lambda line: print(line, flush=True)))
    except (ImportError, AttributeError, ValueError) as mistake:
        sys.exit(f"fewbit_fx: {check!r}: {mistake}")


def _show_codebook(name: str, bits: int, density: Density, plot: Path | None) -> None:
    book = codebook(name, bits, density)
    sample = sample_derivative(derivative_of(activation(name)), density)
    print(f"{name}, {bits} bit{'s' if bits > 1 else ''}, density of x: {density}")
    print("\n".join(_codebook_table(book, sample)))
    print(
        f"  error of the derivative: {book.relative_error:.2%} relative (root mean square), "
        f"{book.mean_squared_error:.3g} mean square"
    )
    if plot is not None:
        try:
            from fewbit_fx.codebooks.plot import plot_codebook
        except ModuleNotFoundError as missing:
            raise ValueError(f"--plot needs {missing.name}: pip install 'fewbit-fx[plot]'") from missing
        plot_codebook(f"{name}, {bits} bits", book, sample, plot)
        print(f"wrote {plot}")


def _codebook_table(book: Codebook, sample: Sample) -> list[str]:
    """A line per code; which values of f' it stands for, and the share of x it is used for."""
    shares = np.bincount(book.ranks(sample.values), weights=sample.weights, minlength=len(book.levels))
    from_values = ["-inf", *(f"{b:.6f}" for b in book.boundaries)]
    rows = [
        (format(gray_code(rank), f"0{book.bits}b"), f"{level:.6f}", start, f"{share:.1%}")
        for rank, (level, start, share) in enumerate(zip(book.levels, from_values, shares, strict=True))
    ]
    head = ("code", "level", "from f'(x) =", "share of x")
    return text_table(head, rows, right=head)


if __name__ == "__main__":
    main()
