"""compute-sanitizer over small cases of the GPU kernels: memcheck, racecheck, initcheck, synccheck, side by side."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bdfast.testing import Case, OpSuite, suites
from bdfast.testing.tables import Cell, Table
from benchmarks.checks.numerics import outputs, runnable
from benchmarks.environment import ROOT
from benchmarks.stage import Context, Result, SkipStage, Stage
from tools import toolchain

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OPTIONS = (
    *("--target-processes", "application-only"),  # not Triton's compilers
    *("--report-api-errors", "no"),  # torch tries calls that may fail
    *("--print-limit", "1000"),
)
CASES_AN_OP = 3
DONE = "every case ran"
TORCH = re.compile(r"\b(at::|c10::|cub::|cutlass|cublas|cudnn|nvjet|sm\d+_xmma)")
SUMMARY = re.compile(r"^=+ (?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", re.MULTILINE)
BLOCK = re.compile(r"^=+ (?P<head>\S.*)\n(?P<frames>(?:=+ {2,}.*\n)+)", re.MULTILINE)


def run(context: Context) -> Result:
    """A line a tool: cases run, errors in bdfast's kernels, errors in PyTorch's (which do not count)."""
    program = find_sanitizer()
    if context.device.type != "cuda":
        raise SkipStage("--device cpu: compute-sanitizer watches CUDA kernels")
    if program is None:
        raise SkipStage("no compute-sanitizer beside nvcc or on PATH")
    return watch(program, context)


def find_sanitizer() -> str | None:
    """compute-sanitizer beside nvcc, where the toolkit has it or a link to it, then on PATH."""
    nvcc = toolchain.find_nvcc()
    binaries = [] if nvcc is None else [Path(nvcc).parent, Path(nvcc).resolve().parent]
    folders = [*binaries, *(folder.parent / "compute-sanitizer" for folder in binaries)]
    return next(filter(None, (shutil.which("compute-sanitizer", path=str(folder)) for folder in folders)), None) or (
        shutil.which("compute-sanitizer")
    )


def watch(program: str, context: Context) -> Result:
    """All tools at once, each over a process of its own, until the deadline."""
    result: Result = {"lines": [], "failures": []}
    case_list = [sys.executable, "-m", "benchmarks.checks.sanitizer", context.device.type]
    # Blocks of PyTorch's allocator lie side by side in one allocation: reads past the end of one would be valid.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        logs = {tool: Path(folder, f"{tool}.txt") for tool in TOOLS}
        processes = {}
        for tool, log in logs.items():
            command = [program, "--tool", tool, *OPTIONS, *case_list]
            with log.open("w", encoding="utf-8") as file:
                processes[tool] = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
                )
        for tool, process in processes.items():
            try:
                process.wait(max(0.1, context.seconds_left - 2))  # its orphans end with this stage's process
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            line, failures = verdict(tool, logs[tool].read_text(encoding="utf-8", errors="replace"))
            result["lines"].append(line)
            result["failures"] += failures
            context.save(result)
    return result


def verdict(tool: str, output: str) -> tuple[dict[str, Any], list[str]]:
    """What a tool's output says, and its failures in words.

    Example:
        >>> text = DONE + "\\n========= Invalid __global__ read of size 4 bytes\\n" \\
        ...     "=========     at rows_kernel+0x10\\n========= ERROR SUMMARY: 1 error\\n"
        >>> verdict("memcheck", text)[1]
        ['memcheck: Invalid __global__ read of size 4 bytes at rows_kernel+0x10']
    """
    errors = [(match["head"], match["frames"]) for match in BLOCK.finditer(output)]
    errors = [(head, frames) for head, frames in errors if re.search(r"^=+ +at ", frames, re.MULTILINE)]
    foreign = [head for head, frames in errors if TORCH.search(frames.splitlines()[0])]
    ours = [f"{tool}: {head} {_place(frames)}" for head, frames in errors if not TORCH.search(frames.splitlines()[0])]
    total = sum(int(count) for count in SUMMARY.findall(output))
    failures = list(dict.fromkeys(ours))
    if total and not errors:
        failures.append(f"{tool}: {total} errors in its summary, of a form unknown here")
    finished = DONE in output and SUMMARY.search(output) is not None
    ended = "finished" if finished else "out of time" if SUMMARY.search(output) is None else "ended early"
    if ended == "ended early":
        last = output.strip().splitlines()[-1]
        failures.append(f"{tool}: ended before every case ran: {last[:120]}")
    cases = len(re.findall(r"^case ", output, re.MULTILINE))
    return {"tool": tool, "cases": cases, "errors": len(ours), "in torch": len(foreign), "ended": ended}, failures


def _place(frames: str) -> str:
    return re.sub(r"^=+ +", "", frames.splitlines()[0])


def cases(device: torch.device) -> Iterator[tuple[OpSuite, Case, str]]:
    """A few small cases of every op, on the backends that launch kernels of ours."""
    for suite in suites().values():
        few = [case for case in suite.cases if not case.benchmark and not case.large]
        for case in few[:: len(few) // CASES_AN_OP + 1]:
            for backend in runnable(suite, device, case.dtypes[0]):
                if backend != "reference":
                    yield suite, case, backend


def child(device: torch.device) -> None:
    """What the tools watch."""
    for suite, case, backend in cases(device):
        print(f"case {suite.name} {case.name} {backend}", flush=True)
        outputs(suite, suite.inputs(case, device, case.dtypes[0]), backend)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(DONE, flush=True)


def table(result: Result) -> Table:
    """A line a tool."""
    names = ("tool", "cases", "errors", "in torch", "ended")
    lines: list[list[Cell]] = [[line[name] for name in names] for line in result["lines"]]
    return names, lines


STAGE = Stage("sanitizer", "compute-sanitizer over small cases of the kernels", 50.0, run, table, timed=False)

if __name__ == "__main__":
    began = time.monotonic()
    child(torch.device(sys.argv[1]))
    print(f"{time.monotonic() - began:.1f} s")
