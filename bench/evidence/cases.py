"""Cases of evidence and where their results are kept: a process and a file for each, so that a run goes on later."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import in_fresh_process
from bench.result_file import File


@dataclass(frozen=True)
class Case:
    """One measurement, in a process of its own.

    Attributes:
        part: Of the evidence, and the module that measures it: ``python -m bench.evidence.PART SETTINGS`` prints the
            result as JSON in its last line.
        name: What tells it from the others of its part, such as ``Llama-3, lean``; names its file.
        settings: All that decides its result, as JSON.
    """

    part: str
    name: str
    settings: Mapping[str, Any]

    @property
    def file(self) -> str:
        """Such as ``memory/llama-3_lean.json``."""
        words = (re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-") for word in self.name.split(", "))
        return f"{self.part}/{'_'.join(words)}.json"

    def measured(self, environment: Mapping[str, str] | None = None) -> Any:
        """Its result, by a new process. Raises RuntimeError where that fails."""
        return in_fresh_process(f"bench.evidence.{self.part}", [json.dumps(self.settings)], environment)


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


def answer(measure: Callable[[dict[str, Any]], Any], arguments: Sequence[str] | None) -> None:
    """Be the process of a case: print, as JSON in one line, what is measured with the settings of the command line.

    Args:
        measure: Of the part; takes the settings, returns what JSON has.
        arguments: The command line, or None for that of the process.
    """
    (settings,) = sys.argv[1:] if arguments is None else arguments
    print(json.dumps(measure(json.loads(settings))))


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
        jobs: Cases at a time; times are right with 1 alone.
        environment: Variables of the processes that do not change results, such as where data are.
        show: Called with the name of a case and how many are done.
    """
    missing = [case for case in cases if not store.has(case)]
    threads = {"OMP_NUM_THREADS": "1"} if jobs > 1 else {}
    failures: list[str] = []
    show("", len(cases) - len(missing))
    for done, (case, outcome) in enumerate(_outcomes(missing, jobs, {**environment, **threads}), 1):
        if isinstance(outcome, RuntimeError):
            failures.append(f"{case.part}, {case.name}: {str(outcome).strip().splitlines()[-1]}")
        else:
            store.put(case, outcome, conditions)
        show(case.name, len(cases) - len(missing) + done)
    return failures


def _outcomes(cases: Iterable[Case], jobs: int, environment: Mapping[str, str]) -> Iterator[tuple[Case, Any]]:
    def outcome(case: Case) -> tuple[Case, Any]:
        try:
            return case, case.measured(environment)
        except RuntimeError as error:
            return case, error

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(outcome, case) for case in cases]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            for future in waiting:
                future.cancel()
