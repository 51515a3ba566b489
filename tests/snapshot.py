"""Everything that a restructuring must leave as it is, of every model of the tests, as hashes in a file.

    python tests/snapshot.py before.json            # on the code of before
    python tests/snapshot.py --against before.json  # on the code of now: exits with 1 where anything differs

Of each model, compiled with ``backend="fewbit"`` up to and with the partition, and run by plain ATen: the forward, the
tensors saved (codes among them), the gradients of the parameters, and every row of the report, bit for bit. Models:
those of ``helpers.model_zoo`` and of ``test_report_hf``, at activation memory budgets 1.0 and 0.7. It uses public names
alone, so that it runs on both. Source lines are left out: those of the models move when the tests do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from helpers import autograd_nodes, model_zoo
from plain_aten import no_kernels
from test_report_hf import ARCHITECTURES, model_and_inputs
from torch import Tensor, nn

import fewbit_fx

ROW = ("module", "function", "readers", "shape", "dtype", "action", "reason", "bytes_before", "bytes_after")
ROW += ("relative_error", "levels", "small")


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of values, dtypes and shapes."""
    found = hashlib.sha256()
    for t in tensors:
        dense = t.detach().contiguous()
        found.update(f"{dense.dtype} {tuple(dense.shape)}".encode() + bytes(dense.flatten().view(torch.uint8).tolist()))
    return found.hexdigest()[:16]


def saved_tensors(result: Tensor) -> list[Tensor]:
    """What the autograd graph holds, in its order."""
    saved = (t for node in autograd_nodes(result) for t in getattr(node, "saved_tensors", ()))
    return [t for t in saved if isinstance(t, Tensor)]


def snapshot(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Hashes of one model's step."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend=fewbit_fx.backend(recipe="derivatives", strict=True, min_numel=0))
    torch.manual_seed(1)
    output = compiled(*args, **kwargs)
    result = output if isinstance(output, Tensor) else output.loss
    saved = digest(saved_tensors(result))
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(result.square().sum(), trained, allow_unused=True)
    report = fewbit_fx.last_report()
    rows = [str([row.get(name) for name in ROW]) for graph in report.to_dict()["graphs"] for row in _rows(graph)]
    return {
        "forward": digest([result]),
        "saved": saved,
        "gradients": digest(g for g in gradients if g is not None),
        "bytes": [report.plain_bytes, report.fewbit_bytes],
        "rows": hashlib.sha256("".join(rows).encode()).hexdigest()[:16],
    }


def _rows(graph: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the report: sites, then all else."""
    return [*graph["sites"], *graph["others"]]


def snapshots() -> dict[str, dict[str, Any]]:
    """One of each model at each budget."""
    found = {}
    for budget in (1.0, 0.7):
        with torch._functorch.config.patch(activation_memory_budget=budget), no_kernels():
            torch.manual_seed(0)
            for name, (model, x) in model_zoo().items():
                found[f"{name}, budget {budget}"] = snapshot(model, (x,), {})
            for name in ARCHITECTURES:
                torch.manual_seed(0)
                model, inputs = model_and_inputs(name)
                found[f"{name}, budget {budget}"] = snapshot(model, (), inputs)
            print(f"{len(found)} done", file=sys.stderr)
    return found


def main() -> int:
    """Write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="where to write the hashes")
    parser.add_argument("--against", type=Path, help="hashes to compare with")
    arguments = parser.parse_args()
    found = snapshots()
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1))
    if not arguments.against:
        return 0
    expected = json.loads(arguments.against.read_text())
    different = [
        f"{name}: {key}"
        for name in expected
        for key in expected[name]
        if expected[name] != found.get(name) and expected[name][key] != found.get(name, {}).get(key)
    ]
    print(*different, f"{len(expected) - len({d.split(':')[0] for d in different})} of {len(expected)} equal", sep="\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
