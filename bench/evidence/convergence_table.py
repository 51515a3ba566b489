"""The tables of convergence: what each method trains to on each task, and what follows for each method."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from bench.evidence.convergence_cells import Cell, cells, coded, share_outside_by_chance
from bench.evidence.methods import METHODS, REFERENCE
from bench.result_file import File, markdown, measured_with


def lines(files: Sequence[File]) -> Iterator[str]:
    """A row for each task and metric, a column for each method: mean and standard deviation over seeds."""
    found = cells(files)
    methods = [name for name in METHODS if any(cell.method == name for cell in found)]
    by_place = {(cell.task, cell.metric, cell.method): cell for cell in found}
    rows = dict.fromkeys((cell.task, cell.metric) for cell in found)
    body = (
        [f"{task}: {metric.name}", *(_cell(by_place.get((task, metric, name))) for name in methods)]
        for task, metric in rows
    )
    yield from markdown(["mean ± standard deviation over seeds", *methods], *body)
    yield f"\n<sub>{measured_with(files)}; {_trained(files)}. {_caption(_seeds(files))} {_steps(files)}.</sub>"


def _caption(seeds: int) -> str:
    bold = (
        f"Bold: the difference to {REFERENCE}, the mean over seeds of trainings with the same seed, is larger than the "
        f"standard deviation of {REFERENCE} over seeds; chance alone does that to {_by_chance(seeds)}. "
    )
    return f"{bold if seeds > 1 else ''}Losses are in nats, all else is in points of a hundred."


def _by_chance(seeds: int) -> str:
    return f"up to {100 * share_outside_by_chance(seeds):.0f} % of cells with {seeds} seeds"


def _seeds(files: Sequence[File]) -> int:
    return len({file.data["settings"]["seed"] for file in files})


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = cell.metric.text(cell.mean)
    if cell.deviation is not None:
        text += f" ± {cell.metric.text(cell.deviation)}"
    return f"**{text}**" if cell.is_within is False else text


def _trained(files: Sequence[File]) -> str:
    settings = [file.data["settings"] for file in files]
    seeds = _seeds(files)
    return f"{seeds} seed{'s' * (seeds > 1)}, {' and '.join(sorted({each['dtype'] for each in settings}))}"


def _steps(files: Sequence[File]) -> str:
    """Tasks of the same steps together."""
    tasks: dict[str, list[str]] = {}
    for file in files:
        settings, result = file.data["settings"], file.data["result"]
        what = f"{settings['steps']} steps of {result['tokens_per_step']:,} {result['unit']}"
        if settings["task"] not in tasks.setdefault(what, []):
            tasks[what].append(settings["task"])
    return "; ".join(f"{what}: {' / '.join(names)}" for what, names in tasks.items())


def verdict_lines(files: Sequence[File]) -> Iterator[str]:
    """A row for each method, and what they say together.

    From which setting on is the difference to exact training within the spread of the seeds, and does the error of the
    gradient, which takes seconds to measure, predict it?
    """
    found = cells(files)
    verdicts = [_Verdict(name, [cell for cell in found if cell.method == name]) for name in METHODS]
    told = [verdict for verdict in verdicts if verdict.of]
    if not told:
        yield "No method has been trained with two seeds or more beside exact training."
        return
    head = "method", "within the spread", "scores, mean change", "losses, mean change", "error of the gradient"
    yield from markdown(head, *(verdict.row() for verdict in told))
    yield f"\n{_from_which_on(told, _seeds(files))} {_prediction(found)}"
    yield (
        "\n<sub>Of each row of the table of tasks. Changes are means over rows ± their standard error: of scores in "
        "points of a hundred, more is better; of losses in percent, less is better. Errors are the mean of the first "
        f"gradient's and of one halfway. {measured_with(files)}.</sub>"
    )


class _Verdict:
    """What is known of one method, of the cells where there is a spread to compare with."""

    def __init__(self, method: str, found: Sequence[Cell]) -> None:
        self.method = method
        self._cells = [cell for cell in found if cell.is_within is not None]
        self.of, self.outside = len(self._cells), sum(not cell.is_within for cell in self._cells)
        errors = [cell.gradient_error for cell in self._cells if cell.gradient_error is not None]
        self.error = statistics.fmean(errors) if errors else None
        self._scores = [100 * cell.difference for cell in self._cells if not cell.metric.is_loss]  # type: ignore[operator]
        self._losses = [
            100 * cell.difference / statistics.fmean(cell.exact.values())  # type: ignore[operator]
            for cell in self._cells
            if cell.metric.is_loss
        ]

    @property
    def is_worse(self) -> bool:
        """Whether scores or losses are worse on average, by more than two standard errors of that."""
        return any(map(_is_below_zero, (self._scores, [-change for change in self._losses])))

    def row(self) -> tuple[str, ...]:
        """Of the table."""
        error = "exact" if self.error is None else f"{100 * self.error:.2f} %"
        within = f"{self.of - self.outside} of {self.of}"
        return self.method, within, _mean(self._scores), _mean(self._losses, " %"), error


def _mean(values: Sequence[float], unit: str = "") -> str:
    if not values:
        return ""
    error = f" ± {_standard_error(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.2f}{error}{unit}"


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _is_below_zero(values: Sequence[float]) -> bool:
    return len(values) > 1 and statistics.fmean(values) < -2 * _standard_error(values)


def _from_which_on(told: Sequence[_Verdict], seeds: int) -> str:
    """By means, and by rows outside the spread, of which chance explains as many as the binomial's 95 % quantile."""
    from scipy.stats import binom

    chance = share_outside_by_chance(seeds)
    by_error = sorted((each for each in told if each.error is not None), key=lambda each: each.error or 0.0)

    def is_good(each: _Verdict) -> bool:
        return each.outside <= binom.ppf(0.95, each.of, chance) and not each.is_worse

    good = list(itertools.takewhile(is_good, by_error))
    what = (
        f"outside the spread no more often than chance alone explains ({_by_chance(seeds)}, and their scatter), and on "
        "average no worse by more than two standard errors"
    )
    if not good:
        return f"Even the setting of the least error is not {what}."
    error = 100 * (good[-1].error or 0.0)
    return f"From an error of the gradient of {error:.2f} % down (`{good[-1].method}`), settings are {what}."


def _prediction(found: Sequence[Cell]) -> str:
    from scipy.stats import spearmanr

    pairs = list(coded(found))
    if len(pairs) < 3:
        return "Too few cells to tell whether the error of the gradient predicts the difference."
    correlation = spearmanr(*zip(*pairs, strict=True))[0]
    return (
        f"Over {len(pairs)} cells of tasks and methods, the rank correlation of that error with the size of the "
        f"difference, in units of the spread, is {correlation:.2f}."
    )
