"""``pytest benchmarks --benchmark-only``: the ratio table after pytest-benchmark's own."""

from __future__ import annotations

import os
from typing import Any

# Before torch starts OpenMP: threads that spin between calls cost a busy machine of two cores four to eight times.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

from bdfast.testing import rows
from bdfast.testing.tables import text_table
from bdfast.testing.timing import Timing

Group = tuple[str, str, str]
"""(op, case, dtype)"""

MEASURED = pytest.StashKey[dict[Group, dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    config.stash[MEASURED] = {}


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> dict[Group, dict[str, Any]]:
    """What was measured so far: timings by row, and the bytes that a call moves."""
    return request.config.stash[MEASURED]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    records = []
    for (op, case, dtype), group in config.stash[MEASURED].items():
        timings: dict[str, Timing] = group["timings"]
        if {rows.OURS, rows.COPY} <= timings.keys():
            records.append({"op": op, "case": case, "dtype": dtype, **rows.figures(group["bytes"], timings)})
    if records:
        terminalreporter.section("bdfast: median us, and how many times as long the others take")
        terminalreporter.write_line(text_table(rows.table(records)))
        terminalreporter.write_line("rows were timed one after another: compare.py interleaves them")
