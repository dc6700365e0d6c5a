"""Compiles, in several processes at once, what the stage ``ops`` will time: it then finds code in the caches."""

from __future__ import annotations

import time
from functools import partial

import torch

from bdfast.testing import drawn_there, rows, suites
from bdfast.testing.tables import Cell, Table
from benchmarks.checks import workers
from benchmarks.end_to_end import pgd
from benchmarks.stage import Context, Result, Stage

PGD = "pgd"  # the stage whose torch.compile takes longest


def run(context: Context) -> Result:
    """A line an op: cases compiled, and seconds of the process that did it."""
    lines: list[dict[str, object]] = []
    work = partial(compile_one, device=context.device, quick=context.quick)
    for line in workers.each(work, [PGD, *suites()], context):
        lines.append(line)
        context.save({"lines": lines})
    return {"lines": lines}


def compile_one(name: str, device: torch.device, quick: bool) -> dict[str, object]:
    """The loop of PGD that is timed beside the engine, or an op."""
    if name != PGD:
        return compile_op(name, device, quick)
    began = time.monotonic()
    if not quick:
        pgd.compile_loop(device)
    return {"op": name, "cases": int(not quick), "failed": 0, "seconds": round(time.monotonic() - began, 1)}


def compile_op(name: str, device: torch.device, quick: bool) -> dict[str, object]:
    """Call everything that is timed of an op once; what fails here fails in ``ops`` again, where it is reported."""
    began, suite, failed = time.monotonic(), drawn_there(suites()[name]), 0
    cases = [case for case in suite.cases if case.benchmark and not case.large]
    cases = [rows.small_case(suite)] if quick else cases
    for case in cases:
        for index, dtype in enumerate(case.dtypes[:1] if quick else case.dtypes):
            steps, _ = rows.prepare(suite, case, device, dtype, compiled=index == 0 and not quick)
            for step in steps.values():
                try:
                    step()
                except Exception:
                    failed += 1
    return {"op": name, "cases": len(cases), "failed": failed, "seconds": round(time.monotonic() - began, 1)}


def table(result: Result) -> Table:
    """A line an op."""
    names = ("op", "cases", "failed", "seconds")
    lines: list[list[Cell]] = [[line[name] for name in names] for line in result["lines"]]  # type: ignore[misc]
    return names, lines


STAGE = Stage("compile", "compiling what will be timed", 105.0, run, table, timed=False)
