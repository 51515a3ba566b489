"""``python -m bench NAME``: run one of the benchmarks, or list them."""

from __future__ import annotations

import runpy
import sys

from rich.console import Console
from rich.table import Table

COMMANDS = {
    "evidence": "memory, speed, error and convergence of every method, in tables and plots",
    "saved": "bytes saved of architectures that people train",
    "patterns": "bytes saved of each part of a model",
    "step": "time and memory of whole training steps",
    "operator": "time of single activations",
    "block": "time of MLP blocks",
    "compile_time": "time of compilation",
    "kernels": "kernels and bytes moved of a GPU's code",
    "convergence": "losses after training, by recipe",
    "bias": "bias and scatter of gradients, against the noise between batches",
    "codebooks": "levels against those that the paper's library ships",
    "demo": "a training with and without fewbit",
    "readme_tables": "the README's tables, made anew",
}


def main() -> None:
    """Run the command that is named first, with what follows it."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        table = Table("python -m bench ...", "measures", box=None)
        for command, about in COMMANDS.items():
            table.add_row(command, about)
        Console().print(table)
        raise SystemExit(0 if name in ("", "-h", "--help") else f"there is no benchmark {name!r}")
    del sys.argv[1]
    runpy.run_module(f"bench.{name}", run_name="__main__")


if __name__ == "__main__":
    main()
