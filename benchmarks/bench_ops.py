"""Every op on every benchmarked case, a row each for bdfast, what users write instead, and a copy of as many bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bdfast.testing import Case, OpSuite, rows, suites
from bdfast.testing.timing import Timing

CPU = torch.device("cpu")


def parameters() -> Iterator[Any]:
    for suite, case, dtype in rows.cases():
        for row in rows.makers(suite):
            name = f"{suite.name}-{case.name}-{rows.dtype_name(dtype)}-{row}"
            yield pytest.param(suite, case, dtype, row, id=name)


@functools.cache
def failures(op: str, case: str, dtype: torch.dtype) -> list[str]:
    suite = suites()[op]
    return rows.failures(suite, next(c for c in suite.cases if c.name == case), CPU, dtype)


@pytest.mark.parametrize(("suite", "case", "dtype", "row"), list(parameters()))
def bench_op(
    suite: OpSuite, case: Case, dtype: torch.dtype, row: str, benchmark: Any, measured: dict[Any, dict[str, Any]]
) -> None:
    if wrong := failures(suite.name, case.name, dtype):
        pytest.fail("not timed, since it is wrong: " + "; ".join(wrong), pytrace=False)
    if row == "compile":
        torch.compiler.reset()  # dynamo falls back to eager, silently, after eight shapes of one function
    inputs = suite.inputs(case, CPU, dtype)
    step = rows.makers(suite)[row](inputs)
    step()
    benchmark.group = f"{suite.name} {case.name} {rows.dtype_name(dtype)}"
    benchmark.extra_info |= {"row": row, "bytes": suite.bytes_moved(inputs)}
    benchmark(step)
    if benchmark.stats is not None:  # None under --benchmark-disable
        group = measured.setdefault((suite.name, case.name, rows.dtype_name(dtype)), {"timings": {}})
        group["bytes"] = suite.bytes_moved(inputs)
        group["timings"][row] = Timing((benchmark.stats.stats.median,))
