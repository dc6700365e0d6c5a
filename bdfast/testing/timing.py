"""Timing of calls side by side.

Every round times every call once, so that whatever else the machine does meets all alike, and a ratio is the median of
the ratios of single rounds. That order is what makes ratios repeatable on a shared machine; times are not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Step = Callable[[], Any]
Clock = Callable[[Step, int], float]
"""(step, calls) to seconds a call."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one sample a round."""

    samples: tuple[float, ...]
    calls: int = 1  # behind each sample

    @property
    def median(self) -> float:
        """Median over rounds, in seconds."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, in seconds."""
        if len(self.samples) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    def times(self, other: Timing) -> float:
        """How many times as long ``other`` took: the median over rounds.

        Example:
            >>> Timing((1.0, 2.0, 1.0)).times(Timing((3.0, 6.0, 30.0)))
            3.0
        """
        return statistics.median(theirs / ours for ours, theirs in zip(self.samples, other.samples, strict=True))

    def record(self) -> dict[str, float | int]:
        """For a result file: microseconds."""
        low, high = self.quartiles
        return {
            "us": round(self.median * 1e6, 3),
            "us_q25": round(low * 1e6, 3),
            "us_q75": round(high * 1e6, 3),
            "rounds": len(self.samples),
            "calls": self.calls,
        }


def host_clock(step: Step, calls: int) -> float:
    """Wall time of work that is done when the call returns."""
    began = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - began) / calls


def interleave(
    steps: Mapping[str, Step],
    *,
    clock: Clock = host_clock,
    seconds: float = 2.0,
    sample_seconds: float = 1e-3,
    rounds: tuple[int, int] = (5, 200),
) -> dict[str, Timing]:
    """Time every step once a round.

    Args:
        steps: name -> callable; each is warmed up first.
        clock: how one sample is taken.
        seconds: what all rounds together should take.
        sample_seconds: what a sample should at least take; short steps are called several times for it. 0: one call.
        rounds: the fewest and the most rounds, whatever ``seconds`` says.

    Example:
        >>> timings = interleave({"short": lambda: sum(range(100)), "long": lambda: sum(range(5000))}, seconds=0.1)
        >>> timings["short"].times(timings["long"]) > 5
        True
    """
    calls = {name: _calls(step, clock, sample_seconds) for name, step in steps.items()}
    a_round = sum(clock(step, calls[name]) * calls[name] for name, step in steps.items())
    fewest, most = rounds
    count = min(most, max(fewest, int(seconds / max(a_round, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(count):
        first = turn % len(names)  # another one begins every round: none always runs in the wake of the same one
        for name in names[first:] + names[:first]:
            samples[name].append(clock(steps[name], calls[name]))
    return {name: Timing(tuple(values), calls[name]) for name, values in samples.items()}


def _calls(step: Step, clock: Clock, sample_seconds: float) -> int:
    """Warm up, and find how many calls last ``sample_seconds``."""
    clock(step, 2)
    calls = 1
    while (elapsed := clock(step, calls) * calls) < sample_seconds:
        calls = max(2 * calls, math.ceil(0.8 * calls * sample_seconds / max(elapsed, 1e-9)))
    return calls
