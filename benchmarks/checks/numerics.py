"""Every backend of every op on every case against float64, and bit-identical reruns."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bdfast.backends import find
from bdfast.testing import Case, Inputs, OpSuite, Outputs, drawn_there, parity, suites
from bdfast.testing.rows import dtype_name
from bdfast.testing.tables import Cell, Table
from benchmarks.checks import workers
from benchmarks.stage import Context, Result, Stage

RERUNS = 20
QUICK_CASES = 6  # an op at most, with 3 reruns


def run(context: Context) -> Result:
    """For each op and backend: cases run, what is wrong, what differs between reruns."""
    lines: list[dict[str, Any]] = []
    failures: list[str] = []
    work = partial(check_op, device=context.device, quick=context.quick)
    for found, wrong in workers.each(work, list(suites()), context):
        lines += found
        failures += wrong
        context.save({"lines": lines, "failures": failures})
    return {"lines": lines, "failures": failures, "reruns": RERUNS}


def check_op(name: str, device: torch.device, quick: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """A line a backend, and what is wrong in words; large cases have a stage of their own."""
    here = suites()[name]
    there = drawn_there(here)  # of the cases that are timed, a CPU takes seconds to draw one
    lines: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    cases = [case for case in here.cases if not case.large]
    few = [case for case in cases if not case.benchmark]
    for case in few[:: len(few) // QUICK_CASES + 1] if quick else cases:
        suite = there if case.benchmark else here
        for dtype in case.dtypes[:1] if quick else case.dtypes:
            for backend in runnable(suite, device, dtype):
                line = lines.setdefault(backend, {"op": name, "backend": backend, "cases": 0, "wrong": 0})
                line["cases"] += 1
                wrong = check(suite, case, backend, device, dtype, 3 if quick else RERUNS)
                line["wrong"] += bool(wrong)
                failures += [f"{name} {case.name} {dtype_name(dtype)} {backend}: {reason}" for reason in wrong]
    return list(lines.values()), failures


def runnable(suite: OpSuite, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends of an op that can run here, but for Triton's interpreter on the CPU, which tests alone use."""
    reasons = find(suite.name).reasons(torch.empty(0, device=device, dtype=dtype))
    runs = [backend for backend, reason in reasons.items() if reason is None]
    return [backend for backend in runs if device.type != "cpu" or backend != "triton"]


def check(suite: OpSuite, case: Case, backend: str, device: torch.device, dtype: torch.dtype, reruns: int) -> list[str]:
    """What is wrong with one combination, in words."""
    try:
        wrong = [str(mismatch) for mismatch in parity(suite, case, backend, device, dtype)]
        inputs = suite.inputs(case, device, dtype)
        first = outputs(suite, inputs, backend)
        for _ in range(reruns - 1):
            again = outputs(suite, inputs, backend)
            wrong += [f"{name} differs between reruns" for name in first if not identical(first[name], again[name])]
    except Exception as error:  # of one combination; the others are checked all the same
        return [f"{type(error).__name__}: {error}"]
    return list(dict.fromkeys(wrong))


def outputs(suite: OpSuite, inputs: Inputs, backend: str) -> Outputs:
    """The op on a copy of ``inputs``, which it may change."""
    return suite.run({name: copied(value) for name, value in inputs.items()}, backend)


def copied(value: Any) -> Any:
    """A copy with the same strides, gaps between rows included."""
    if isinstance(value, list):
        return [copied(item) for item in value]
    if isinstance(value, Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device).copy_(value)
    return value


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal, or NaN in both."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def table(result: Result) -> Table:
    """A line an op and backend."""
    lines: list[list[Cell]] = [[x["op"], x["backend"], x["cases"], x["wrong"]] for x in result["lines"]]
    return ("op", "backend", "cases", "wrong"), lines


STAGE = Stage("numerics", f"every backend against float64, {RERUNS} reruns", 105.0, run, table, timed=False)
