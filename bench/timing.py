"""Compare callables by letting them take turns in one process.

Machines warm up, throttle and are shared, so times taken minutes apart do not compare. Here every
round gives each candidate one turn, the order rotates, and ratios are taken within a round.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Clock = Callable[[Callable[[], object], int], float]
"""Takes a callable and a number of calls, makes them, and returns the seconds that they took."""

TURN = 0.02  # seconds: long against a clock's resolution, short against a machine's moods
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """How long one candidate takes.

    Attributes:
        name: Of the candidate.
        calls: Calls in each of its turns.
        rounds: Turns that it had.
        median_s: Median over the rounds of the mean time of a call, in seconds.
        lower_s, upper_s: Quartiles of the same, in seconds.
        ratio: Median over the rounds of its time over the first candidate's in that round.
    """

    name: str
    calls: int
    rounds: int
    median_s: float
    lower_s: float
    upper_s: float
    ratio: float

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.upper_s - self.lower_s) / 2 / self.median_s


def compare(
    candidates: Mapping[str, Callable[[], object]],
    *,
    clock: Clock,
    seconds: float,
    turn: float = TURN,
    advance: Callable[[float], object] = lambda _: None,
) -> dict[str, Timing]:
    """Time the candidates against each other, the first being what the others are compared with.

    Args:
        candidates: Callables by name.
        clock: See :func:`clock_for`.
        seconds: All turns together take about so long, or :data:`MIN_ROUNDS` rounds where that is longer.
        turn: Seconds that a turn takes at least; each candidate makes as many calls as that needs.
        advance: Called after each round with the share that is done, 0 to 1.

    Returns:
        A timing for each candidate, by name.
    """
    calls = {name: _calls_per_turn(function, clock, turn) for name, function in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    spent = 0.0
    for done in itertools.count():
        if spent >= seconds and done >= MIN_ROUNDS:
            break
        for name in _rotated(list(candidates), done):
            taken = clock(candidates[name], calls[name])
            spent += taken
            times[name].append(taken / calls[name])
        advance(min(1.0, spent / seconds, (done + 1) / MIN_ROUNDS))
    return timings_of(times, calls)


def timings_of(times: Mapping[str, Sequence[float]], calls: Mapping[str, int] | None = None) -> dict[str, Timing]:
    """A timing for each candidate from its times by round, of which two at least are needed.

    Args:
        times: Mean seconds of a call, by candidate and round; the first candidate is what the others are compared with.
        calls: In each of a candidate's turns; 1 where it is not said.
    """
    reference = next(iter(times.values()))
    return {name: _timing(name, (calls or {}).get(name, 1), series, reference) for name, series in times.items()}


def clock_for(device: torch.device) -> Clock:
    """The device's own clock: CUDA events, which do not wait for Python, or ``time.perf_counter``."""
    return _cuda_clock if device.type == "cuda" else _host_clock


def _host_clock(function: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - started


def _cuda_clock(function: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _calls_per_turn(function: Callable[[], object], clock: Clock, turn: float) -> int:
    """The least power of two of calls that takes a turn; what a first call alone does is not counted."""
    function()
    calls = 1
    while clock(function, calls) < turn:
        calls *= 2
    return calls


def _rotated(names: list[str], by: int) -> list[str]:
    start = by % len(names)
    return names[start:] + names[:start]


def _timing(name: str, calls: int, times: Sequence[float], reference: Sequence[float]) -> Timing:
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    ratio = statistics.median(own / other for own, other in zip(times, reference, strict=True))
    return Timing(name, calls, len(times), median, lower, upper, ratio)
