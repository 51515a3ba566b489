"""The peak of a step, of one method on one model: ``python -m bench.evidence.peak SETTINGS`` prints it as JSON.

It is apart from memory and time, for it needs more layers and a larger batch: else gradients, and what one layer
computes at a time, are the most of it. It takes no times, so that other work may go on beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.comparison import mebibytes
from bench.evidence.cases import Case, Settings
from bench.evidence.memory import Step, answer_for_memory, example_of, memory_of
from bench.evidence.methods import METHODS, REFERENCE
from bench.evidence.models import MODELS, Scale, sizes_of
from bench.result_file import File, markdown, measured_with

PART = "peak"
_LAYERS, _BATCH, _TOKENS = 2, 2, 2


def larger(scale: Scale) -> Scale:
    """Twice the layers, the batch and the tokens."""
    return replace(scale, layers=_LAYERS * scale.layers, batch=_BATCH * scale.batch, tokens=_TOKENS * scale.tokens)


def case(model: str, method: str, scale: Scale, dtype: str, device: str) -> Case:
    """One method on one model; arguments as of :func:`bench.evidence.memory.case`."""
    settings = {"model": model, "method": method, "scale": asdict(scale), "dtype": dtype, "device": device}
    return Case(PART, f"{model}, {method}", settings)


def measure(cases: Sequence[Settings]) -> list[dict[str, int]]:
    """All of a case, in this process."""
    (settings,) = cases
    step = Step(example_of(settings), METHODS[settings["method"]])
    return [asdict(memory_of(step, torch.device(settings["device"])))]


def lines(files: Sequence[File]) -> Iterator[str]:
    """A row for each model, a column for each method, of files of this part or of memory and time."""
    found = {(f.data["settings"]["model"], f.data["settings"]["method"]): _memory_in(f.data["result"]) for f in files}
    methods = [name for name in METHODS if any((model, name) in found for model in MODELS)]
    models = [name for name in MODELS if (name, REFERENCE) in found]
    rows = ([model, *(_cell(found, model, method) for method in methods)] for model in models)
    yield from markdown(["peak of a step, held", *methods], *rows)
    dtype, sizes = files[0].data["settings"]["dtype"], sizes_of(f.data["settings"]["scale"] for f in files)
    yield f"\n<sub>{_CAPTION} {dtype}, {sizes}. {measured_with(files)}.</sub>"


_CAPTION = (
    "Peak of a forward and a backward, with gradients, without parameters; in brackets the bytes held between them. "
    "Both are compared with torch.compile's default."
)


def _memory_in(result: dict[str, Any]) -> dict[str, int]:
    return result.get("memory", result)  # type: ignore[no-any-return]


def _cell(found: dict[tuple[str, str], dict[str, int]], model: str, method: str) -> str:
    if (model, method) not in found:
        return ""
    own, plain = found[model, method], found[model, REFERENCE]
    if method == REFERENCE:
        return f"{mebibytes(plain['peak_bytes'])} ({mebibytes(plain['held_bytes'])})"
    peak, held = (100 * (own[name] / plain[name] - 1) for name in ("peak_bytes", "held_bytes"))
    return f"{peak:+.0f} % ({held:+.0f} %)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the case that the command line has as JSON."""
    answer_for_memory(measure, arguments)


if __name__ == "__main__":
    main()
