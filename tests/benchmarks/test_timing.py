"""Rounds, ratios and tables."""

from __future__ import annotations

import pytest

from bdfast.testing.tables import markdown_table, show, text_table
from bdfast.testing.timing import Timing, interleave


def test_timing_by_hand() -> None:
    timing = Timing((4e-6, 1e-6, 2e-6, 3e-6), calls=7)
    assert timing.median == pytest.approx(2.5e-6)
    assert timing.quartiles == (pytest.approx(1.75e-6), pytest.approx(3.25e-6))
    assert timing.record() == {"us": 2.5, "us_q25": 1.75, "us_q75": 3.25, "rounds": 4, "calls": 7}


def test_ratio_is_that_of_rounds_not_of_medians() -> None:
    """A machine ten times slower in half of the rounds does not change a ratio."""
    ours, theirs = Timing((1.0, 10.0, 1.0, 10.0)), Timing((3.0, 30.0, 3.0, 30.0))
    assert ours.times(theirs) == 3.0


def test_rounds_are_interleaved_and_begin_in_turns() -> None:
    order: list[str] = []
    elapsed = {"a": 1.0, "b": 2.0, "c": 4.0}

    def clock(step: object, calls: int) -> float:
        name = step()  # type: ignore[operator]
        order.append(name)
        return elapsed[name]

    steps = {name: (lambda name=name: name) for name in elapsed}
    timings = interleave(steps, clock=clock, seconds=21.0, sample_seconds=0, rounds=(1, 100))
    assert {name: timing.median for name, timing in timings.items()} == elapsed
    assert all(len(timing.samples) == 3 for timing in timings.values())
    assert order[-9:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_short_steps_are_called_until_a_sample_is_long_enough() -> None:
    calls_seen: list[int] = []

    def clock(step: object, calls: int) -> float:
        calls_seen.append(calls)
        return 1e-6

    timing = interleave({"a": lambda: None}, clock=clock, seconds=0.0, sample_seconds=1e-3, rounds=(2, 2))["a"]
    assert timing.calls >= 1000
    assert calls_seen[-2:] == [timing.calls, timing.calls]


def test_tables() -> None:
    table = (("op", "us", "of copy"), [("a", 1.5, "90 %"), ("longer", None, "wrong")])
    assert text_table(table).splitlines() == ["op       us  of copy", "a       1.5  90 %", "longer    -  wrong"]
    assert markdown_table(table).splitlines()[1:] == ["|---|---:|---|", "| a | 1.5 | 90 % |", "| longer | - | wrong |"]


@pytest.mark.parametrize(
    ("cell", "text"), [(0.0, "0"), (0.001234, "0.00123"), (99.94, "99.9"), (99.96, "100"), (3, "3")]
)
def test_three_digits(cell: float, text: str) -> None:
    assert show(cell) == text
