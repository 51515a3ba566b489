"""The largest batch of which a step fits into so much of a GPU's memory.

``python -m bench.evidence.largest_batch SETTINGS`` prints it as JSON. A step is a forward and a backward. The limit is
set for torch's allocator, with weights and gradients, so that what does not fit raises as on a smaller GPU. Each batch
is a compilation: a line through the peaks of two tells where to try.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from bench.evidence.cases import Case, Settings
from bench.evidence.memory import Step, answer_for_memory, example_of
from bench.evidence.methods import METHODS, REFERENCE
from bench.evidence.models import MODELS, Scale
from bench.result_file import File, markdown, measured_with

PART = "largest_batch"
GiB = 2**30
METHODS_OF_PART = ("inductor", "budget 0.9", "checkpoint", "default", "lean")
MODELS_OF_PART = ("GPT-2", "ViT", "Llama-3", "Llama-3, LoRA on everything")
_LIMIT_GIB = 6
_EXACT_TO = 0.02  # of the batch
_FIRST = 4


@dataclass(frozen=True)
class Found:
    """The largest batch.

    Attributes:
        batch: Sequences or images.
        peak_bytes: Of its step, by the allocator.
    """

    batch: int
    peak_bytes: int


def case(model: str, method: str, scale: Scale, dtype: str) -> Case:
    """One method on one model; arguments as of :func:`bench.evidence.memory.case`, on a GPU."""
    settings = {"model": model, "method": method, "scale": asdict(scale), "dtype": dtype, "device": "cuda"}
    return Case(PART, f"{model}, {method}", {**settings, "limit_gib": _LIMIT_GIB})


def smallest(scale: Scale) -> Scale:
    """Where to begin: shorter sequences than elsewhere, so that a batch has many."""
    return replace(scale, batch=_FIRST, tokens=scale.tokens // 2)


def largest(peak_of: Callable[[int], int | None], limit: int, start: int) -> tuple[int, int]:
    """The largest batch that fits, to two hundredths, and its peak.

    Args:
        peak_of: Bytes at a batch, or None where it does not fit.
        limit: Bytes there are.
        start: A batch that fits, as does twice it.

    Raises:
        MemoryError: It does not.
    """
    peaks: dict[int, int] = {}
    for batch in (start, 2 * start):
        peak = peak_of(batch)
        if peak is None:
            raise MemoryError(f"a batch of {batch} does not fit into {limit:,} bytes")
        peaks[batch] = peak
    too_large: int | None = None
    while too_large is None or too_large - max(peaks) > max(1, round(_EXACT_TO * max(peaks))):
        batch = _next(peaks, limit, too_large)
        peak = peak_of(batch)
        if peak is None:
            too_large = batch
        else:
            peaks[batch] = peak
    return max(peaks), peaks[max(peaks)]


def _next(peaks: dict[int, int], limit: int, too_large: int | None) -> int:
    """Where a line through the two largest that fit meets the limit, or just beyond what fits."""
    low, high = sorted(peaks)[-2:]
    slope = (peaks[high] - peaks[low]) / (high - low)
    guess = high + int((limit - peaks[high]) / slope) if slope > 0 else 2 * high
    guess = max(guess, high + max(1, round(_EXACT_TO * high)))
    return guess if too_large is None or guess < too_large else (high + too_large) // 2


def measure(cases: Sequence[Settings]) -> list[dict[str, int]]:
    """All of a case, in this process."""
    (settings,) = cases
    limit = settings["limit_gib"] * GiB
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)

    def peak_of(batch: int) -> int | None:
        scale = replace(Scale(**settings["scale"]), batch=batch)
        try:
            return _peak({**settings, "scale": asdict(scale)})
        except torch.OutOfMemoryError:
            return None

    return [asdict(Found(*largest(peak_of, limit, settings["scale"]["batch"])))]


def _peak(settings: Settings) -> int:
    torch.compiler.reset()
    gc.collect()  # what did not fit may be held by a graph that failed
    torch.cuda.empty_cache()
    step = Step(example_of(settings), METHODS[settings["method"]])
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def lines(files: Sequence[File]) -> Iterator[str]:
    """A row for each model, a column for each method."""
    found = {(f.data["settings"]["model"], f.data["settings"]["method"]): f.data["result"]["batch"] for f in files}
    methods = [name for name in METHODS if any((model, name) in found for model in MODELS)]
    models = [name for name in MODELS if (name, REFERENCE) in found]
    rows = ([model, *(_cell(found, model, method) for method in methods)] for model in models)
    settings = files[0].data["settings"]
    yield from markdown([f"largest batch in {settings['limit_gib']} GiB", *methods], *rows)
    scale = settings["scale"]
    sizes = f"{settings['dtype']}, {scale['layers']} layers, sequences of {scale['tokens']} tokens"
    yield f"\n<sub>Of a forward and a backward, with weights and gradients. {sizes}. {measured_with(files)}.</sub>"


def _cell(found: dict[tuple[str, str], int], model: str, method: str) -> str:
    if (model, method) not in found:
        return ""
    own, plain = found[model, method], found[model, REFERENCE]
    return str(own) if method == REFERENCE else f"{own} (x {own / plain:.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the case that the command line has as JSON."""
    answer_for_memory(measure, arguments)


if __name__ == "__main__":
    main()
