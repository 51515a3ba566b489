"""Measure memory, speed, error and convergence of every method, or what of it is not there yet, and draw it.

python -m bench evidence --quick
python -m bench evidence --models Llama-3 ViT --tasks CoLA --data DIR

Each case has a process and a JSON file of its own in the output's folder, so that Ctrl-C, or a machine that goes away,
costs one case: the same command goes on where it was. With --quick those of a model share a process. Tables and
plots are made from the files, at the end and with --render at any time. GLUE is read from DIR (CoLA/train.tsv and so
on) or fetched by the package datasets; a run without --tasks leaves it out where there is neither.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.command import DTYPES, Command, count_flag, parser_of, seconds_flag
from bench.evidence import (
    codebooks,
    codebooks_table,
    convergence,
    convergence_plot,
    convergence_table,
    largest_batch,
    memory,
    memory_plot,
    memory_table,
    peak,
)
from bench.evidence.cases import Case, Store, run
from bench.evidence.methods import METHODS, OF_CONVERGENCE, OF_MEMORY
from bench.evidence.models import MODELS, QUICK, Scale, scale_for
from bench.evidence.tasks import DATA, TASKS
from bench.result_file import File

PARTS = ("codebooks", "memory", "peak", "largest_batch", "convergence")
_ONE_BY_ONE = ("codebooks", "memory", "peak")
"""Parts of which one process alone measures on a CPU: times are right so, and peaks have the machine's memory."""
_QUICK_BITS = (2,)
_QUICK_MODELS = ("Llama-3",)
_QUICK_METHODS = ("inductor", "budget 0.9", "default", "lean")

Lines = Callable[[Sequence[File]], Iterator[str]]
TABLES: Mapping[str, tuple[tuple[str, Lines], ...]] = {
    "codebooks": (("Codebooks", codebooks_table.lines),),
    "memory": (
        ("Memory and time", memory_table.lines),
        ("Every method", memory_table.all_lines),
        ("The best of each", memory_table.best_lines),
        ("Methods of fewbit that another method beats in bytes, at no more time and error", memory_table.verdict),
    ),
    "peak": (("Peak of a step", peak.lines),),
    "largest_batch": (("Largest batch", largest_batch.lines),),
    "convergence": (
        ("Convergence", convergence_table.lines),
        ("From which setting on", convergence_table.verdict_lines),
    ),
}
"""By part: titles, and what makes a table."""
PLOTS: Mapping[str, Callable[[Path, Sequence[File]], None]] = {
    "memory": memory_plot.save_plot,
    "convergence": convergence_plot.save_plot,
}


def cases_of(flags: argparse.Namespace) -> dict[str, list[Case]]:
    """What the flags ask for, by part, whether it has been measured or not."""
    parts = {
        "codebooks": lambda: [codebooks.case(_QUICK_BITS) if flags.quick else codebooks.case()],
        "memory": lambda: list(_memory_cases(flags)),
        "peak": lambda: list(_peak_cases(flags)),
        "largest_batch": lambda: list(_batch_cases(flags)),
        "convergence": lambda: _convergence_cases(flags),
    }
    found = {name: make() for name, make in parts.items() if name in flags.parts}
    return {name: list(map(_of_one_process, cases)) for name, cases in found.items()} if flags.quick else found


def _of_one_process(case: Case) -> Case:
    """With the others of its part and its model: less time is spent, and times hang on what was compiled before."""
    return replace(case, process=case.settings.get("model", case.part))


def _memory_cases(flags: argparse.Namespace) -> Iterator[Case]:
    for model, method in _models_and_methods(flags):
        yield memory.case(model, method, _scale(flags, model), flags.dtype, flags.device.type, flags.seconds)


def _peak_cases(flags: argparse.Namespace) -> Iterator[Case]:
    if flags.device.type == "cuda" or flags.quick:
        return  # a GPU measures memory and time at a size that has the peak in it, and a quick run is for minutes
    for model, method in _models_and_methods(flags):
        yield peak.case(model, method, peak.larger(_scale(flags, model)), flags.dtype, flags.device.type)


def _batch_cases(flags: argparse.Namespace) -> Iterator[Case]:
    if flags.device.type != "cuda" or flags.quick:
        return  # a CPU has no limit of its own
    for model in flags.models or largest_batch.MODELS_OF_PART:
        for method in flags.methods or largest_batch.METHODS_OF_PART:
            yield largest_batch.case(model, method, largest_batch.smallest(_scale(flags, model)), flags.dtype)


def _models_and_methods(flags: argparse.Namespace) -> Iterator[tuple[str, str]]:
    models = flags.models or (_QUICK_MODELS if flags.quick else MODELS)
    methods = flags.methods or (_QUICK_METHODS if flags.quick else OF_MEMORY)
    yield from ((model, method) for model in models for method in methods if method in OF_MEMORY)


def _scale(flags: argparse.Namespace, model: str) -> Scale:
    return QUICK if flags.quick else scale_for(model, flags.device.type)


def _convergence_cases(flags: argparse.Namespace) -> list[Case]:
    if flags.quick:
        return convergence.quick_cases(flags.device.type)
    methods = [name for name in flags.methods or OF_CONVERGENCE if name in OF_CONVERGENCE]
    return convergence.cases(
        flags.tasks or _tasks_with_data(flags.data),
        methods,
        range(flags.seeds),
        flags.device.type,
        steps=flags.steps,
    )


def _tasks_with_data(folder: Path | None) -> list[str]:
    """All but GLUE where neither its files nor the package that fetches them is there."""
    has_data = folder is not None or importlib.util.find_spec("datasets") is not None
    return [name for name, task in TASKS.items() if has_data or not task.needs_data]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, measure what is missing, and make tables and plots."""
    flags = _parser().parse_args(arguments)
    flags.output.mkdir(exist_ok=True)
    command = Command.started("evidence", arguments, flags, [f"dtype {flags.dtype}"])
    store = Store(flags.output)
    failures = [] if flags.render else _measure(flags, store, command)
    for path in render(store, flags.output):
        command.console.print(f"wrote {path}")
    for failure in failures:
        command.console.print(f"[red]failed:[/] {failure}")
    if failures:
        raise SystemExit(1)


def _measure(flags: argparse.Namespace, store: Store, command: Command) -> list[str]:
    """One part after the other. Returns what failed."""
    environment = {DATA: str(flags.data.absolute())} if flags.data is not None else {}
    parts = cases_of(flags)
    failures: list[str] = []
    with command.progress(sum(map(len, parts.values()))) as show:
        done = 0
        for part, cases in parts.items():
            jobs = 1 if part in _ONE_BY_ONE and flags.device.type == "cpu" else flags.jobs
            failures += run(cases, store, command.about, jobs, environment, lambda name, i, n=done: show(name, n + i))
            done += len(cases)
    return failures


def render(store: Store, folder: Path) -> Iterator[Path]:
    """Write the tables and plots of what there is; yields what was written."""
    text = []
    for part, tables in TABLES.items():
        files = store.files(part)
        for title, lines in tables if files else ():
            text += [f"## {title}\n", *lines(files), ""]
        if files and part in PLOTS:
            picture = folder / f"{part}.png"
            PLOTS[part](picture, files)
            if picture.exists():
                text.append(f"![{part}]({picture.name})\n")
                yield picture
    page = folder / "tables.md"
    page.write_text("\n".join(text))
    yield page


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("evidence", __doc__, output="a folder")
    add = parser.add_argument
    add("--quick", action="store_true", help="small models and few cases, minutes on two cores")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help=f"of {', '.join(PARTS)} (default all)")
    add("--models", nargs="+", choices=MODELS, metavar="NAME", help=f"of {', '.join(MODELS)} (default all)")
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)} (default all)")
    add("--tasks", nargs="+", choices=TASKS, metavar="NAME", help=f"of {', '.join(TASKS)} (default all)")
    add("--seeds", type=count_flag, default=3, help="of each training, from 0 on (default 3)")
    add("--steps", type=count_flag, help="of each training (default: what two cores do in minutes)")
    add("--data", type=_folder, help="the folder that GLUE is in", metavar="DIR")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of memory's models (default bfloat16)")
    add("--seconds", type=seconds_flag, default=5.0, help="of timing each case (default 5)")
    jobs = max(1, (os.cpu_count() or 1) // 2)
    add("--jobs", type=count_flag, default=jobs, help=f"processes at a time, where that disturbs nothing ({jobs})")
    add("--render", action="store_true", help="measure nothing: make tables and plots of what there is")
    return parser


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}; there is no such folder")
    return Path(text)
