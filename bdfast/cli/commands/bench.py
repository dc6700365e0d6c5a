"""``bdfast bench``: how fast the ops are here, beside plain PyTorch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bdfast.cli.command import DONE, FINDING, Command
from bdfast.cli.environment import cpu, gpu, versions
from bdfast.cli.inputs import choose_device
from bdfast.cli.outputs import write_json
from bdfast.errors import message
from bdfast.testing import Case, OpSuite, device_timing, rows, suites
from bdfast.testing.tables import text_table
from bdfast.testing.timing import Timing, interleave


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("op", nargs="*", metavar="OP", help="ops whose names contain one of these words (all)")
    parser.add_argument("--case", default="", metavar="WORD", help="cases whose names contain this")
    parser.add_argument("--dtype", default="float32", metavar="WORD", help="dtypes whose names contain this (float32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: the GPU if there is one")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="for all rounds of a case (1)")
    parser.add_argument("--compile", action="store_true", help="beside torch.compile, too, which takes 20 s a case")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON, too")


def run(options: argparse.Namespace) -> int:
    """Check each case, time it, print a table; 1 where an op is wrong."""
    device = choose_device("bdfast bench", options.device)
    chosen = [c for c in rows.cases(case=options.case, dtype=options.dtype) if _wanted(c[0], options.op)]
    if not chosen:
        words = " ".join([*options.op, options.case, options.dtype]).strip()
        known = f"words in the names of {', '.join(suites())}, their cases and dtypes"
        raise ValueError(message("bdfast bench", "OP", known, repr(words), "see `bdfast doctor` for the ops"))
    records = []
    for suite, case, dtype in chosen:
        print(f"  {suite.name} {case.name} {rows.dtype_name(dtype)}", file=sys.stderr, flush=True)
        records.append(measure(suite, case, dtype, device, options.seconds, compiled=options.compile))
    print(text_table(rows.table(records)))
    print("us: median of a call; vs: how many times as long the others take; of copy: against a copy of as many bytes")
    if options.out is not None:
        facts = {"versions": versions(), "cpu": cpu(), "gpu": gpu(), "device": str(device)}
        write_json(Path(options.out), {**facts, "threads": torch.get_num_threads(), "records": records})
    return FINDING if any("failures" in record for record in records) else DONE


def measure(
    suite: OpSuite, case: Case, dtype: torch.dtype, device: torch.device, seconds: float, *, compiled: bool
) -> dict[str, Any]:
    """One line; nothing is timed where the op is wrong.

    Example:
        >>> suite = suites()["sce_margin"]
        >>> case = rows.small_case(suite)
        >>> line = measure(suite, case, torch.float32, torch.device("cpu"), 0.01, compiled=False)
        >>> line["op"], line["us"] > 0
        ('sce_margin', True)
    """
    if reasons := rows.failures(suite, case, device, dtype):
        return rows.failed_record(suite, case, dtype, reasons)
    steps, moved = rows.prepare(suite, case, device, dtype, compiled=compiled)
    timings: Mapping[str, Timing]
    if device.type == "cuda":
        timings = interleave(steps, clock=device_timing.event_clock(device), seconds=seconds, sample_seconds=0.0)
    else:
        timings = interleave(steps, seconds=seconds)
    return rows.record(suite, case, dtype, moved, timings)


def _wanted(suite: OpSuite, words: list[str]) -> bool:
    return not words or any(word in suite.name for word in words)


COMMAND = Command(
    name="bench",
    summary="time the ops here, beside plain PyTorch",
    description=(
        "Time the ops on this machine, interleaved with the PyTorch that users write instead. Every case is first\n"
        "checked against float64. For figures to publish, see benchmarks/ of the source tree."
    ),
    example="  bdfast bench\n  bdfast bench sce kl --compile --out ops.json",
    add_arguments=add_arguments,
    run=run,
    finding="an op is wrong",
)
