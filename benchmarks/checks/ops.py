"""Speed of every op on the device: plain calls and graph replays, beside eager and compiled PyTorch and a copy."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch

from bdfast.backends import explain
from bdfast.runtime.progress import Stopwatch
from bdfast.testing import Case, OpSuite, device_timing, drawn_there, rows, suites
from bdfast.testing.tables import Cell, Table
from bdfast.testing.timing import Step, Timing, interleave
from benchmarks.checks.numerics import runnable
from benchmarks.stage import Context, Result, Stage

SECONDS_A_CASE = 0.12
COMPILE_SECONDS = 15.0  # what one torch.compile may take: none is begun with less left
MODES = ("plain", "graph", "wall")
LARGE_ROWS = (rows.OURS, "eager", rows.COPY)  # of large cases


def run(context: Context) -> Result:
    """A record a case, ops taking turns; without torch.compile where time is short."""
    records: list[dict[str, Any]] = []
    not_timed: list[str] = []
    for suite, case, dtype in order(context):
        name = f"{suite.name} {case.name} {rows.dtype_name(dtype)}"
        if context.seconds_left < 5:
            not_timed.append(name)
            continue
        print(name, flush=True)
        try:
            records.append(one(suite, case, dtype, context))
        except torch.OutOfMemoryError:
            not_timed.append(f"{name} (not enough memory)")
        except Exception as error:  # of one case; the others are timed all the same
            records.append(rows.failed_record(suite, case, dtype, [f"{type(error).__name__}: {error}"]))
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
        context.save({"records": records, "not_timed": not_timed})
    failures = [f"{r['op']} {r['case']} {r['dtype']}: {why}" for r in records for why in r.get("failures", [])]
    return {"records": records, "not_timed": not_timed, "failures": failures}


def order(context: Context) -> list[tuple[OpSuite, Case, torch.dtype]]:
    """Cases round robin over ops, so that a short run still says something of every op; first dtypes, float16 last."""
    if context.quick:
        small = [(suite, rows.small_case(suite)) for suite in suites().values()]
        return [(suite, case, case.dtypes[0]) for suite, case in small]
    by_op: dict[str, list[tuple[OpSuite, Case, torch.dtype]]] = {}
    for entry in rows.cases(large=context.device.type == "cuda"):
        by_op.setdefault(entry[0].name, []).append(entry)
    turns = [entry for turn in zip_longest(*by_op.values()) for entry in turn if entry is not None]
    return sorted(turns, key=lambda entry: (entry[2] != entry[1].dtypes[0], entry[2] == torch.float16))


def one(suite: OpSuite, case: Case, dtype: torch.dtype, context: Context) -> dict[str, Any]:
    """Check a case, then time it."""
    took, suite = Stopwatch(context.device), drawn_there(suite)
    # A float64 reference of a large case does not fit; the stage `large` checks those.
    with took("check"):
        reasons = [] if case.large else rows.failures(suite, case, context.device, dtype)
    if reasons:
        return rows.failed_record(suite, case, dtype, reasons)
    compiled = not (context.quick or case.large) and dtype == case.dtypes[0]
    compiled = compiled and context.seconds_left > COMPILE_SECONDS
    with took("prepare"):
        steps, moved = rows.prepare(suite, case, context.device, dtype, compiled=compiled)
        steps |= backend_steps(suite, case, dtype, context)
    if case.large:  # where time is short and bandwidth is what is asked for
        steps = {name: step for name, step in steps.items() if name in LARGE_ROWS}
    if context.device.type == "cuda":
        with took("time"):
            timings, no_graph = device_timing.measure(steps, context.device, SECONDS_A_CASE)
        activities = {}
        if dtype == case.dtypes[0]:  # and of ours alone: it takes longer than the timing
            with took("profile"):
                activities[rows.OURS] = device_timing.activity(steps[rows.OURS])
    else:
        timings = {"plain": interleave(steps, seconds=0.1, rounds=(3, 50))}
        no_graph, activities = {}, {}
    chosen = explain(suite.name, device=context.device, dtype=dtype).chosen
    return {
        **rows.identity(suite, case, dtype),
        "backend": chosen,
        **summary(moved, timings),
        "no_graph": no_graph,
        "activity": activities,
        "took": {part: round(seconds, 2) for part, seconds in took.seconds.items()},
    }


def backend_steps(suite: OpSuite, case: Case, dtype: torch.dtype, context: Context) -> dict[str, Step]:
    """The fast backends by name where there are several: what ``auto`` should choose among."""
    fast = [name for name in runnable(suite, context.device, dtype) if name != "reference"]
    if len(fast) < 2:
        return {}
    return {name: suite.step(suite.inputs(case, context.device, dtype), name) for name in fast}


def summary(moved: int, timings: Mapping[str, Mapping[str, Timing]]) -> dict[str, Any]:
    """By mode, the figures of bdfast and of every row."""
    modes = {
        mode: {
            **rows.figures(moved, timings[mode]),
            "rows": {name: timing.record() for name, timing in timings[mode].items()},
        }
        for mode in MODES
        if {rows.OURS, rows.COPY} <= timings.get(mode, {}).keys()
    }
    return {"bytes": moved, "modes": modes}


def table(result: Result) -> Table:
    """A line a case: plain and replayed, with the ratios of each."""
    header = ["op", "case", "dtype", "backend", "us", "vs eager", "vs compile", "graph us"]
    header += ["graph vs eager", "graph vs compile", "wall us", "GB/s", "of copy", "kernels", "syncs"]
    lines: list[list[Cell]] = []
    for record in result["records"]:
        head: list[Cell] = [record["op"], record["case"], record["dtype"]]
        if "failures" in record:
            lines.append([*head, "WRONG", *(None for _ in header[4:])])
            continue
        plain, graph, wall = (record["modes"].get(mode, {}) for mode in MODES)
        best = graph or plain
        did = record["activity"].get(rows.OURS, {})
        lines.append([
            *head, record["backend"], plain["us"], *_ratios(plain), graph.get("us"), *_ratios(graph), wall.get("us"),
            best["gb_per_s"], f"{100 * best['share_of_copy']:.0f} %", did.get("kernels"), did.get("syncs"),
        ])  # fmt: skip
    return header, lines


def _ratios(figures: Mapping[str, Any]) -> list[float | None]:
    return [figures.get("ratios", {}).get(name) for name in ("eager", "compile")]


STAGE = Stage("ops", "speed of the ops", 85.0, run, table)
