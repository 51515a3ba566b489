"""Make the tables of the README and of docs/ from the files in bench/results.

python -m bench.readme_tables

A table stands between ``<!-- results: NAME DEVICE -->`` and ``<!-- end of results -->``, such as ``demo cpu`` and
``speed cpu``. Beneath it is a line with the conditions of all files that it is made from. Tables of ``bench.evidence``
are made from a folder of files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench import bias_table, convergence_table, demo_table, patterns, saved_table, speed_table
from bench.evidence import codebooks_table, largest_batch, memory_table, peak
from bench.evidence import convergence_table as evidence_convergence_table
from bench.machine import CHECKOUT
from bench.result_file import File

README = CHECKOUT / "README.md"
TEXTS = (README, *sorted((CHECKOUT / "docs").glob("*.md")))
RESULTS = CHECKOUT / "bench/results"
BEGIN, END = "<!-- results: ", "<!-- end of results -->"
TABLES: Mapping[str, tuple[str, Callable[[Sequence[File]], Iterator[str]]]] = {
    "demo": ("demo_{device}_.*", demo_table.lines),
    "bias": ("bias_{device}", bias_table.lines),
    "convergence": ("convergence_{device}_.*", convergence_table.lines),
    "saved": ("saved_{device}", saved_table.lines),
    "patterns": ("patterns_{device}", patterns.lines),
    "evidence_memory": ("evidence_{device}/memory/.*", memory_table.lines),
    "evidence_every_method": ("evidence_{device}/memory/.*", memory_table.all_lines),
    "evidence_peak": ("evidence_{device}/peak/.*", peak.lines),
    "evidence_peak_beside_time": ("evidence_{device}/memory/.*", peak.lines),
    "evidence_largest_batch": ("evidence_{device}/largest_batch/.*", largest_batch.lines),
    "evidence_best": ("evidence_{device}/memory/.*", memory_table.best_lines),
    "evidence_beaten": ("evidence_{device}/memory/.*", memory_table.verdict),
    "evidence_codebooks": ("evidence_{device}/codebooks/.*", codebooks_table.lines),
    "evidence_convergence": ("evidence_{device}/convergence/.*", evidence_convergence_table.lines),
    "evidence_verdict": ("evidence_{device}/convergence/.*", evidence_convergence_table.verdict_lines),
    "speed": (f"({'|'.join(speed_table.RATIOS)}).*_{{device}}", speed_table.lines),
}
"""By name: the names of the files that a table is made from, and how."""
_BLOCK = re.compile(rf"({BEGIN}(\w+) (\w+) -->\n).*?({END})", re.DOTALL)


def render(text: str, folder: Path = RESULTS) -> str:
    """The text with each table made anew from a folder's files; all else is left as it is.

    Raises:
        ValueError: A marker names no table or has no end, or there is no file to make its table from.
    """
    if text.count(BEGIN) != len(_BLOCK.findall(text)):
        raise ValueError(f"a marker is not of the form {BEGIN}NAME DEVICE --> ... {END}")
    return _BLOCK.sub(lambda found: f"{found[1]}{_table(found[2], found[3], folder)}\n{found[4]}", text)


def _table(name: str, device: str, folder: Path) -> str:
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}; allowed is {' or '.join(TABLES)}")
    pattern, make = TABLES[name]
    of_device = re.compile(pattern.format(device=device))
    paths = [path for path in sorted(folder.rglob("*.json")) if of_device.fullmatch(_name(path, folder))]
    if not paths:
        raise ValueError(f"no file in {folder.name} is named {pattern.format(device=device)}.json")
    return "\n".join(make([File(path.stem, json.loads(path.read_text())) for path in paths]))


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def main() -> None:
    """Write the texts with their tables made anew."""
    for text in TEXTS:
        before = text.read_text()
        after = render(before)
        text.write_text(after)
        print(f"{text.name}: {'as it was' if after == before else 'tables made anew'}")


if __name__ == "__main__":
    main()
