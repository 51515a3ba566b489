"""The table of speed: fewbit's time over inductor's, of operators, blocks, steps and compilations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.backends import BUDGETED, FEWBIT, TITLES
from bench.command import DTYPES, MiB
from bench.result_file import File, markdown, measured_with
from fewbit_fx.config import FewBitConfig


@dataclass(frozen=True)
class Ratio:
    """fewbit's time over inductor's for one thing at one dtype.

    Attributes:
        thing: What was timed.
        dtype: Of it.
        value: The ratio, below 1 where fewbit is faster.
        file: Where it is from.
        detail: What else is to be said of it.
    """

    thing: str
    dtype: str
    value: float
    file: File
    detail: str = ""


def lines(files: Sequence[File]) -> Iterator[str]:
    """A row for each thing that was timed at the default bits, a column for each dtype; the latest file counts."""
    found: dict[str, dict[str, Ratio]] = {}  # by thing and dtype
    for kind, ratios in RATIOS.items():
        for file in sorted((f for f in files if f.name.startswith(kind)), key=lambda file: file.conditions["date"]):
            for ratio in ratios(file) if _has_default_bits(file) else ():
                found.setdefault(ratio.thing, {})[ratio.dtype] = ratio
    yield from markdown(("time, fewbit over inductor", *DTYPES, "command"), *_rows(found))
    used = {ratio.file.name: ratio.file for ratios in found.values() for ratio in ratios.values()}
    yield f"\n<sub>{measured_with(used.values())}; {FewBitConfig.bits} bits.</sub>"


def _rows(found: Mapping[str, Mapping[str, Ratio]]) -> Iterator[list[str]]:
    shown = ""
    for thing, ratios in found.items():
        details = dict.fromkeys(ratio.detail for ratio in ratios.values() if ratio.detail)
        command = " or ".join(dict.fromkeys(f"`{ratio.file.command}`" for ratio in ratios.values()))
        values = (f"{ratios[dtype].value:.2f}" if dtype in ratios else "" for dtype in DTYPES)
        yield [", ".join((thing, *details)), *values, command if command != shown else ""]
        shown = command


_NAMES = {
    "gelu": "GELU",
    "silu": "SiLU",
    "relu+dropout": "ReLU + dropout",
    "mlp": "MLP",
    "gpt": "the demo's GPT",
    "llama": "the demo's Llama",
    "vit": "a ViT",
    "roberta": "RoBERTa",
}
_ELEMENTS = 2**22


def _operators(file: File) -> Iterator[Ratio]:
    for row in file.data["rows"]:
        masks = any("mask" in saved for saved in row["saved"])  # take one bit, whatever the option says
        if row["numel"] == _ELEMENTS and row["backend"] == "fewbit" and (masks or row["bits"] == FewBitConfig.bits):
            thing = f"{_name(row['operator'])}, {_ELEMENTS // MiB} Mi elements"
            happened = dict.fromkeys(saved.partition(": ")[2].partition(",")[0] for saved in row["saved"])
            yield Ratio(thing, row["dtype"], row["both"]["timing"]["ratio"], file, ", ".join(happened))


def _blocks(file: File) -> Iterator[Ratio]:
    for row in file.data["rows"]:
        case, first = row["case"], file.data["rows"][0]["case"]
        if row["backend"] == "fewbit" and case["batch"] == first["batch"]:
            size = f"{case['batch']} x {case['context']} x {case['width']}"
            how = "trained" if case["training"] == "full" else case["training"]
            yield Ratio(f"{_name(case['block'])} block, {size}, {how}", case["dtype"], row["timing"]["ratio"], file)


def _steps(file: File) -> Iterator[Ratio]:
    settings, timings = file.data["settings"], file.data["results"]["timings"]
    if timings:
        size = f"{settings['layers']} layers, {settings['batch']} x {settings['sequence']}{', LoRA' * settings['lora']}"
        thing = f"training step of {_name(settings['model'])}, {size}{_recipe(settings)}"
        budget = f"{timings[BUDGETED]['ratio']:.2f} with {TITLES[BUDGETED]}" if BUDGETED in timings else ""
        yield Ratio(thing, settings["dtype"], timings[FEWBIT]["ratio"], file, budget)


def _compilations(file: File) -> Iterator[Ratio]:
    recipe = _recipe(file.data["settings"])
    for row in file.data["rows"]:
        details = f"{100 * row['pass_s'] / row['fewbit_s']:.0f} % of it in fewbit's passes"
        if "budget_ratio" in row:
            details = f"{row['budget_ratio']:.2f} with {TITLES[BUDGETED]}; {details}"
        yield Ratio(f"cold compilation, {row['layers']} layers{recipe}", "float32", row["ratio"], file, details)


def _recipe(settings: Mapping[str, Any]) -> str:
    return f", recipe {settings['recipe']}" if "recipe" in settings else ""


def _has_default_bits(file: File) -> bool:
    """Operators have several numbers of bits in one file, told by row."""
    bits = file.data.get("bits", file.data.get("settings", {}).get("bits"))
    return bits in (None, FewBitConfig.bits)


def _name(word: str) -> str:
    return _NAMES.get(word, word)


RATIOS: Mapping[str, Callable[[File], Iterator[Ratio]]] = {
    "operator": _operators,
    "block": _blocks,
    "step": _steps,
    "compile_time": _compilations,
}
