"""Trainings of several seeds, gathered: how far a method's results are from those of exact training.

The spread is the standard deviation of exact training's results over the seeds. The difference is the mean over seeds
of what the method changes, of two trainings with the same seed. It is within the spread where its size is at most that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.evidence.methods import METHODS, REFERENCE
from bench.evidence.tasks import TASKS
from bench.evidence.tasks.task import METRICS, Metric
from bench.result_file import File


@dataclass(frozen=True)
class Cell:
    """One metric of one task, trained with one method.

    Attributes:
        task, metric, method: Which.
        values: By seed.
        exact: By seed, of exact training.
        gradient_error: Of the first gradient and of that halfway, the mean over seeds that have it; None where the
            method is exact.
    """

    task: str
    metric: Metric
    method: str
    values: Mapping[int, float]
    exact: Mapping[int, float]
    gradient_error: float | None

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return _deviation(self.values)

    @property
    def difference(self) -> float | None:
        """To exact training, the mean over seeds; None where no seed has both."""
        common = self.values.keys() & self.exact.keys()
        return statistics.fmean(self.values[seed] - self.exact[seed] for seed in common) if common else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of exact training over seeds; None for one seed."""
        return _deviation(self.exact)

    @property
    def is_within(self) -> bool | None:
        """Whether the difference is within the spread; None where either is not known, and of exact training itself."""
        if self.method == REFERENCE or self.difference is None or self.spread is None:
            return None
        return abs(self.difference) <= self.spread

    @property
    def in_spreads(self) -> float | None:
        """The difference in units of the spread, above 0 where the method is better; None where that has no value."""
        if self.is_within is None or not self.spread:
            return None
        assert self.difference is not None
        return self.difference / self.spread * (1 if self.metric.higher_is_better else -1)


def _deviation(values: Mapping[int, float]) -> float | None:
    return statistics.stdev(values.values()) if len(values) > 1 else None


def cells(files: Sequence[File]) -> list[Cell]:
    """All that the files have, in the order of the tasks, their metrics and the methods."""
    results: dict[tuple[str, str], dict[int, Any]] = {}
    for file in files:
        settings = file.data["settings"]
        results.setdefault((settings["task"], settings["method"]), {})[settings["seed"]] = file.data["result"]
    return [
        Cell(
            task,
            METRICS[metric],
            method,
            values,
            _values(results.get((task, REFERENCE), {}), metric),
            _mean_error(found),
        )
        for task in TASKS
        for metric in TASKS[task].metrics
        for method in METHODS
        if (found := results.get((task, method))) and (values := _values(found, metric))
    ]


def _values(found: Mapping[int, Any], metric: str) -> dict[int, float]:
    """By seed; files from before the task had the metric are left out."""
    return {seed: found[seed]["metrics"][metric] for seed in sorted(found) if metric in found[seed]["metrics"]}


def _mean_error(found: Mapping[int, Any]) -> float | None:
    errors = [value for result in found.values() for value in (result["gradient_error"] or {}).values()]
    return statistics.fmean(errors) if errors else None


def share_outside_by_chance(seeds: int) -> float:
    """Of cells whose difference is that of unrelated exact trainings, how many are outside the spread.

    Differences of trainings with unrelated noise have twice its variance, so that the mean over n seeds is Student's t
    with n - 1 degrees of freedom times the spread times the root of 2 / n. Where a seed moves both trainings alike,
    there are fewer.
    """
    from scipy.stats import t

    return float(2 * t.sf(math.sqrt(seeds / 2), seeds - 1))


def coded(found: Sequence[Cell]) -> Iterator[tuple[float, float]]:
    """Error of the gradient, and size of the difference in spreads, where something is coded and both are known."""
    for cell in found:
        if cell.gradient_error and cell.in_spreads is not None:
            yield cell.gradient_error, abs(cell.in_spreads)
