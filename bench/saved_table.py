"""The README's table of architectures: what each recipe saves, against inductor and its memory budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.architectures import FLOAT32_ADAPTERS
from bench.comparison import mebibytes
from bench.result_file import File, markdown, measured_with

SHOWN = (
    "GPT-2",
    "Llama-3",
    "Qwen3",
    "ViT",
    "Llama-3, LoRA on attention",
    "Llama-3, LoRA on all linear layers",
    "Llama-3, LoRA on all linear layers, float32 adapters",
    "ResNet-50",
)
_RECIPES = ("exact", "default", "lean")
_ADAPTED = f", LoRA on attention{FLOAT32_ADAPTERS}"


def lines(files: Sequence[File]) -> Iterator[str]:
    """A row for each architecture shown, and one for the mean of all transformers and of those with adapters."""
    (file,) = files
    rows = {row["name"]: row for row in file.data["rows"]}
    groups = {
        " transformers": [row for row in rows.values() if row["group"] == "transformer"],
        _ADAPTED: [row for row in rows.values() if row["name"].endswith(_ADAPTED)],
    }
    head = ("saved for backward", "inductor", "budget 0.9", *(f'recipe "{name}"' for name in _RECIPES))
    body = [[name, *_cells(rows[name])] for name in SHOWN if name in rows]
    body += [[f"mean of {len(group)}{what}", *_means(group)] for what, group in groups.items() if group]
    yield from markdown(head, *body)
    error = "In brackets the error of the first gradient by codes alone, which is that in float32."
    yield f"\n<sub>{measured_with(files)}; {file.setting('dtype')}. {error}</sub>"


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    plain = row["inductor_bytes"]
    yield mebibytes(plain)
    yield _percent(row["budget_bytes"] / plain)
    for name in _RECIPES:
        case = row["recipes"][name]
        error = f" ({100 * case['codes_error']:.1f} %)" if case["codes_error"] else ""
        yield f"{_percent(case['saved_bytes'] / plain)}{error}"


def _means(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield ""
    yield _percent(sum(row["budget_bytes"] / row["inductor_bytes"] for row in rows) / len(rows))
    for name in _RECIPES:
        shares = [row["recipes"][name]["saved_bytes"] / row["inductor_bytes"] for row in rows]
        yield _percent(sum(shares) / len(shares))


def _percent(share: float) -> str:
    return f"{100 * (share - 1):+.0f} %"
