# ruff: noqa: E402  (the path comes first)
"""Ops on the CPU, interleaved with what users write instead: medians of many rounds, and ratios within rounds.

    python benchmarks/compare.py                          every op, both heaps, benchmarks/results/cpu_<commit>.json
    python benchmarks/compare.py --op hinge --seconds 5   more rounds of one op

Heaps: glibc gives large blocks back to the system when they are freed, so that fresh outputs of many megabytes cost
more in page faults than in arithmetic. ``default`` measures that, as users meet it; ``kept`` tells glibc to keep its
memory and shows the kernels alone. Each case runs in a process of its own, since a heap remembers what was done to it
(huge pages that one op asked for serve the next one, too), and with OpenMP threads that sleep instead of spinning.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch

from bdfast.testing import Case, OpSuite, rows
from bdfast.testing.tables import text_table
from bdfast.testing.timing import interleave
from benchmarks import environment, goals

KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""Read by glibc when a process starts: blocks of any size come from the heap, and the heap never shrinks."""

HEAPS = {"default": {}, "kept": KEPT}


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 where an op is wrong."""
    command = sys.argv if argv is None else ["benchmarks/compare.py", *argv]
    arguments = _parser().parse_args(argv)
    if arguments.child is not None:
        arguments.child.write_text(
            json.dumps(measure(arguments, selected(arguments)[arguments.place])), encoding="utf-8"
        )
        return 0
    names = list(HEAPS) if arguments.heap == "both" else [arguments.heap]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # The documentation shows float32: a run of it alone, a third of the time, is complete.
    partial = any((arguments.op, arguments.case, arguments.dtype not in (None, "float32"), arguments.no_compile))
    result: dict[str, Any] = {
        "kind": "cpu",
        "complete": arguments.heap == "both" and not partial,
        "environment": environment.facts(torch.device("cpu"), command),
        "heaps": {},
    }
    for name in names:
        options = sys.argv[1:] if argv is None else argv
        result["heaps"][name] = [_in_child(name, options, place) for place in range(len(selected(arguments)))]
        _show(name, result["heaps"][name])
    path = arguments.output or environment.RESULTS / f"cpu_{result['environment']['commit']}.json"
    environment.write(path, result)
    print(f"\nwrote {path}")
    return int(any("failures" in record for records in result["heaps"].values() for record in records))


Chosen = tuple[OpSuite, Case, torch.dtype]


def selected(arguments: argparse.Namespace) -> list[Chosen]:
    """The cases asked for."""
    return list(rows.cases(op=arguments.op, case=arguments.case, dtype=arguments.dtype))


def measure(arguments: argparse.Namespace, chosen: Chosen) -> dict[str, Any]:
    """The record of a case, in this process."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, (suite, case, dtype) = torch.device("cpu"), chosen
    print(f"  {suite.name} {case.name} {rows.dtype_name(dtype)}", file=sys.stderr, flush=True)
    if reasons := rows.failures(suite, case, device, dtype):
        return rows.failed_record(suite, case, dtype, reasons)
    steps, moved = rows.prepare(suite, case, device, dtype, compiled=not arguments.no_compile)
    timings = interleave(steps, seconds=arguments.seconds, rounds=(arguments.min_rounds, arguments.max_rounds))
    return rows.record(suite, case, dtype, moved, timings)


def child_environment(heap: str) -> dict[str, str]:
    """The environment of a measuring process."""
    inherited = {name: value for name, value in os.environ.items() if name not in KEPT}
    return {**inherited, "OMP_WAIT_POLICY": "passive", **HEAPS[heap]}


def _in_child(heap: str, options: list[str], place: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "record.json")
        command = [sys.executable, str(Path(__file__).resolve()), *options, "--child", str(path), "--place", str(place)]
        subprocess.run(command, env=child_environment(heap), check=True)
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record


def _show(heap: str, records: list[dict[str, Any]]) -> None:
    print(f"\nheap {heap}: median us of bdfast, and how many times as long the others take\n")
    print(text_table(rows.table(records)))
    for record in records:
        for reason in record.get("failures", []):
            print(f"WRONG {record['op']} {record['case']} {record['dtype']}: {reason}")
    if heap == "default":
        for goal, ratio in goals.verdicts(records):
            mark = "met   " if ratio >= goal.at_least else "MISSED"
            print(f"{mark} {goal.op} {goal.case}: {ratio:.2f} x {goal.baseline}, goal {goal.at_least:g}")


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heap", choices=[*HEAPS, "both"], default="both")
    for name in ("op", "case", "dtype"):
        parser.add_argument(f"--{name}", default="", help=f"only those whose {name} contains this")
    parser.add_argument("--seconds", type=float, default=3.0, help="for all rounds of a case (3)")
    parser.add_argument("--min-rounds", type=int, default=15)
    parser.add_argument("--max-rounds", type=int, default=300)
    parser.add_argument("--threads", type=int, help="of torch and bdfast (as many as torch takes)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes 20 s a case")
    parser.add_argument("--output", type=Path, help="the result file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
