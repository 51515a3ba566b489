"""Cases of evidence and where their results are kept: a file for each, so that a run goes on later."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.evidence.turns import turns_for_all
from bench.measure import in_fresh_process
from bench.result_file import File


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        part: Of the evidence, and the module that measures it: ``python -m bench.evidence.PART SETTINGS`` prints the
            result as JSON in its last line.
        name: What tells it from the others of its part, such as ``Llama-3, lean``; names its file.
        settings: All that decides its result, as JSON.
        process: Cases of one such name share a process, which measures them in turns; None for one of its own.
    """

    part: str
    name: str
    settings: Mapping[str, Any]
    process: str | None = None

    @property
    def file(self) -> str:
        """Such as ``memory/llama-3_lean.json``."""
        words = (re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-") for word in self.name.split(", "))
        return f"{self.part}/{'_'.join(words)}.json"


@dataclass(frozen=True)
class Store:
    """Results in a folder, a file each."""

    folder: Path

    def has(self, case: Case) -> bool:
        """Whether there is a result of this case with these very settings."""
        path = self.folder / case.file
        return path.exists() and json.loads(path.read_text())["settings"] == dict(case.settings)

    def put(self, case: Case, result: Any, conditions: Mapping[str, str]) -> None:
        """Keep a result. The file is there whole or not at all."""
        path = self.folder / case.file
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"name": case.name, "settings": case.settings, "conditions": conditions, "result": result}
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(data, indent=1) + "\n")
        unfinished.replace(path)

    def files(self, part: str) -> list[File]:
        """All results of a part, in the order of their names."""
        return [File(path.stem, json.loads(path.read_text())) for path in sorted((self.folder / part).glob("*.json"))]


Settings = dict[str, Any]


def answer(measure: Callable[[Settings], Any], arguments: Sequence[str] | None) -> None:
    """Be the process of cases: print, as JSON in one line, a result for each of the command line's settings.

    Args:
        measure: Of the part; takes the settings of a case, returns what JSON has.
        arguments: The command line, or None for that of the process.
    """
    answer_together(lambda cases: [measure(settings) for settings in cases], arguments)


def answer_together(measure: Callable[[list[Settings]], list[Any]], arguments: Sequence[str] | None) -> None:
    """The same for a part that measures the cases of a process in turns."""
    print(json.dumps(measure([json.loads(s) for s in (sys.argv[1:] if arguments is None else arguments)])))


def measured(cases: Sequence[Case], environment: Mapping[str, str] | None = None) -> list[Any]:
    """The results of cases of one process, by a new one. Raises RuntimeError where that fails."""
    return in_fresh_process(f"bench.evidence.{cases[0].part}", [json.dumps(c.settings) for c in cases], environment)  # type: ignore[no-any-return]


def run(
    cases: Sequence[Case],
    store: Store,
    conditions: Mapping[str, str],
    jobs: int,
    environment: Mapping[str, str],
    show: Callable[[str, int], object],
) -> list[str]:
    """Measure what the store lacks; returns a line for each case that failed.

    Args:
        cases: All that is asked for.
        store: Where results are kept as soon as they are there.
        conditions: To be kept beside each.
        jobs: Processes at a time.
        environment: Variables of the processes that do not change results, such as where data are.
        show: Called with the name of a case and how many are done.
    """
    missing = [case for case in cases if not store.has(case)]
    threads = {"OMP_NUM_THREADS": "1"} if jobs > 1 else {}
    failures: list[str] = []
    done = len(cases) - len(missing)
    show("", done)
    for process, outcome in _outcomes(_processes(missing), jobs, {**environment, **threads}):
        results = [failure(outcome)] * len(process) if isinstance(outcome, RuntimeError) else outcome
        for case, result in zip(process, results, strict=True):
            if _FAILED in result:
                failures.append(f"{case.part}, {case.name}: {result[_FAILED]}")
            else:
                store.put(case, result, conditions)
            done += 1
            show(case.name, done)
    return failures


_FAILED = "failed"


def failure(error: Exception) -> dict[str, str]:
    """In place of a result."""
    return {_FAILED: (str(error).strip() or type(error).__name__).splitlines()[-1]}


def _processes(cases: Iterable[Case]) -> list[list[Case]]:
    """The cases of each process."""
    found: dict[object, list[Case]] = {}
    for case in cases:
        found.setdefault(case.process or case.file, []).append(case)
    return list(found.values())


def _outcomes(
    processes: Iterable[list[Case]], jobs: int, environment: Mapping[str, str]
) -> Iterator[tuple[list[Case], list[Any] | RuntimeError]]:
    def outcome(cases: list[Case]) -> tuple[list[Case], list[Any] | RuntimeError]:
        try:
            return cases, measured(cases, environment)
        except RuntimeError as error:
            return cases, error

    with ThreadPoolExecutor(jobs) as pool, turns_for_all() as turns:
        environment = {**environment, **turns}
        waiting = [pool.submit(outcome, cases) for cases in processes]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            for future in waiting:
                future.cancel()
