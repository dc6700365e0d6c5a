"""Cases that need tens of gigabytes: beyond 2^31 elements, indices have to be 64 bits wide.

A float64 reference would not fit beside them, so they are held against the float32 reference on the same device, by
relative norms of chunks: an index that wraps puts a whole chunk in the wrong place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bdfast.testing import TOLERANCES, Case, OpSuite, drawn_there, rows, suites
from bdfast.testing.tables import Cell, Table
from benchmarks.checks.numerics import copied, runnable
from benchmarks.stage import Context, Result, SkipStage, Stage

CHUNK = 2**26
LOOSE = 1e-3  # rounding is the business of the stage `numerics`; an index that wraps errs by about 1
QUICK_CHUNK = 7  # elements: so that small cases have several


def run(context: Context) -> Result:
    """A line a case and backend."""
    if context.device.type != "cuda" and not context.quick:
        raise SkipStage("large cases need the memory of a GPU; --quick takes small ones in their place")
    lines: list[dict[str, object]] = []
    failures: list[str] = []
    for suite in suites().values():
        for case in [rows.small_case(suite)] if context.quick else [c for c in suite.cases if c.large]:
            for dtype in case.dtypes[:1]:
                for line in check(suite, case, dtype, context):
                    lines.append(line)
                    if line["verdict"] == "wrong":
                        failures.append(f"{suite.name} {case.name} {line['backend']}: error {line['error']}")
                    context.save({"lines": lines, "failures": failures})
    return {"lines": lines, "failures": failures}


def check(suite: OpSuite, case: Case, dtype: torch.dtype, context: Context) -> list[dict[str, object]]:
    """Every fast backend on one case, against the reference."""
    lines = []
    inputs = drawn_there(suite).inputs(case, context.device, dtype)  # a CPU takes half a minute for 2^31 numbers
    allowed = max(LOOSE, TOLERANCES[dtype].relative)
    for backend in runnable(suite, context.device, dtype):
        if backend == "reference":
            continue
        line: dict[str, object] = {
            "op": suite.name,
            "case": case.name,
            "dtype": rows.dtype_name(dtype),
            "backend": backend,
        }
        try:
            got = suite.run({name: copied(value) for name, value in inputs.items()}, backend)
            expected = suite.run({name: copied(value) for name, value in inputs.items()}, "reference")
            chunk = QUICK_CHUNK if context.quick else CHUNK
            error = max(relative_error(got[name], expected[name], chunk) for name in got)
            lines.append({**line, "error": error, "verdict": "right" if error <= allowed else "wrong"})
            del got, expected
        except torch.OutOfMemoryError:
            lines.append({**line, "error": None, "verdict": "not enough memory"})
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
    return lines


def relative_error(got: Tensor, expected: Tensor, chunk: int) -> float:
    """The worst of ``||got - expected|| / ||expected||`` over chunks, in float64.

    Example:
        >>> relative_error(torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([1.0, 2.0, 0.0, 4.0]), 2)
        0.25
        >>> relative_error(torch.tensor([float("nan")]), torch.tensor([1.0]), 2)
        inf
    """
    worst = 0.0
    a_chunks, b_chunks = (torch.split(t.reshape(-1), chunk) for t in (got, expected))
    for a, b in zip(a_chunks, b_chunks, strict=True):
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())  # infinities and NaN have to be where they belong
        difference = float((a - b).masked_fill(same, 0.0).norm())
        size = float(b.masked_fill(~b.isfinite(), 0.0).norm())
        error = 0.0 if difference == 0 else difference / size if size > 0 else math.inf
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def table(result: Result) -> Table:
    """A line a case and backend."""
    names = ("op", "case", "dtype", "backend", "error", "verdict")
    lines: list[list[Cell]] = [[line[name] for name in names] for line in result["lines"]]
    return names, lines


STAGE = Stage("large", "cases beyond 2^31 elements", 105.0, run, table, timed=False)
