# ruff: noqa: E402  (the path comes first)
"""Everything that only a GPU can tell, in one command of less than nine minutes.

    python benchmarks/gpu_check.py --data cifar10_jpeg.npz      build, check, time, defend
    python benchmarks/gpu_check.py --device cpu --quick         the same on small cases, to see that it runs
    python benchmarks/gpu_check.py --only ops d3                some of the stages

Needs an NVIDIA GPU, its torch and nvcc, and no network. Every stage runs in a process of its own with a time bound
(that of the next one imports meanwhile, and waits): what fails or runs out of time is reported, with what it had found,
and the next one goes on. Writes one JSON file to
benchmarks/results/gpu_<name>_<commit>.json, and to the folder $OUT if that is set. For a copy of the
sources without their history, BDFAST_COMMIT says which commit it is.

Exit code: 0 all stages passed or were skipped, 1 one failed or ran out of time, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch

from bdfast.testing.tables import text_table
from benchmarks.stage import Context, Result, SkipStage, Stage
from benchmarks.stages import stages

TOTAL_SECONDS = 535.0  # what the stages' shares add up to
GRACE_SECONDS = 5.0  # between a stage's own deadline and its end by force
CORES_TO_SHARE = 8  # from which stages that time nothing run side by side
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # several processes compile; each would start as many more as there are cores
}
LOG_TAIL = 3000  # characters of a failed stage's output that are kept

Report = dict[str, Any]
"""status (passed, failed, skipped, out of time), reason, seconds, result"""


def main(argv: list[str] | None = None) -> int:
    """Run the stages one after another and write what they found."""
    arguments = _parser().parse_args(argv)
    if arguments.child is not None:
        return run_child(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_check: `--device` expected an NVIDIA GPU, got none that torch sees; run it where there is one, or "
            "pass --device cpu --quick to see on small cases that every stage runs",
            file=sys.stderr,
        )
        return 2
    chosen = [stage for stage in stages().values() if not arguments.only or stage.name in arguments.only]
    ends = time.monotonic() + arguments.seconds
    reports: dict[str, Report] = {}
    paths: list[Path] = []
    facts: Report = {}
    command = sys.argv if argv is None else ["benchmarks/gpu_check.py", *argv]
    with tempfile.TemporaryDirectory() as scratch:
        for group, running, limit in turns(chosen, arguments, ends, scratch):
            for stage in group:
                print(f"=== {stage.name}: {stage.title} (at most {limit:.0f} s)", flush=True)
            with ThreadPoolExecutor(len(group)) as pool:
                for child, report in zip(running, pool.map(partial(finish, limit=limit), running), strict=True):
                    reports[child.stage.name] = report
                    print(f"--- {child.stage.name}: {_verdict(report)}\n", flush=True)
            # After each group: whatever ends this, what is known stays. Facts once: the file changes the tree's state.
            facts = facts or _facts(arguments, command)
            paths = _write(arguments, reports, facts)
    print("\n".join(f"wrote {path}" for path in paths))
    _print(chosen, reports)
    return int(any(report["status"] not in ("passed", "skipped") for report in reports.values()))


def side_by_side(chosen: Sequence[Stage]) -> list[list[Stage]]:
    """Stages in groups that run at the same time: neighbours that time nothing, on machines with cores for them."""
    groups: list[list[Stage]] = []
    for stage in chosen:
        if groups and not stage.timed and not groups[-1][-1].timed and (os.cpu_count() or 1) >= CORES_TO_SHARE:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def group_seconds(group: Sequence[Stage]) -> float:
    """What a group's longest stage may take."""
    return max(stage.seconds for stage in group)


def turns(
    chosen: Sequence[Stage], arguments: argparse.Namespace, ends: float, scratch: str
) -> Iterator[tuple[list[Stage], list[Child], float]]:
    """Groups of stages, their processes and the seconds that they have; those of the next group get ready meanwhile."""
    groups = side_by_side(chosen)
    waiting: list[Child] = []
    try:
        for index, group in enumerate(groups):
            running = waiting or [start(stage, arguments, scratch) for stage in group]
            waiting = []
            if index + 1 < len(groups) and group[0].name != "build":  # before it there is no module to import
                waiting = [start(stage, arguments, scratch) for stage in groups[index + 1]]
            # Its share of what is left: stages that end early leave more to those that follow.
            share = group_seconds(group) / sum(map(group_seconds, groups[index:]))
            yield group, running, share * (ends - time.monotonic())
    finally:
        for child in waiting:
            _end(child.process)


@dataclass(frozen=True)
class Child:
    """A stage in a process of its own: imports and a CUDA context are made at once, then it waits for its turn."""

    stage: Stage
    process: subprocess.Popen[str]
    folder: tempfile.TemporaryDirectory[str]  # of its report and its output

    @property
    def report(self) -> Path:
        return Path(self.folder.name, "report.json")

    @property
    def log(self) -> Path:
        return Path(self.folder.name, "log.txt")


def start(stage: Stage, arguments: argparse.Namespace, scratch: str) -> Child:
    """A process that gets ready for a stage, and does nothing yet."""
    folder = tempfile.TemporaryDirectory()
    report, log = (str(Path(folder.name, name)) for name in ("report.json", "log.txt"))
    command = [sys.executable, str(Path(__file__).resolve()), "--child", stage.name, report, scratch]
    command += ["--device", arguments.device]
    command += ["--quick"] * arguments.quick + (["--data", arguments.data] if arguments.data else [])
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            cwd=ROOT, env={**ENVIRONMENT, **os.environ},
        )  # fmt: skip
    return Child(stage, process, folder)


def finish(child: Child, limit: float) -> Report:
    """Let a stage begin, and end it with everything that it started when its time is over."""
    began, process = time.monotonic(), child.process
    try:
        with contextlib.suppress(OSError):  # it may have ended already
            print(limit - GRACE_SECONDS, file=process.stdin, flush=True)
        process.wait(limit)
        timed_out = False
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        _end(process)
    with child.folder:
        report: Report = {"status": "running"}
        if child.report.exists():
            report = json.loads(child.report.read_text(encoding="utf-8"))
        if report["status"] == "running":  # else it was done, even if its process had not ended yet
            ended = {"status": "failed", "reason": f"the process ended with code {process.returncode}"}
            report |= {"status": "out of time", "reason": f"after {limit:.0f} s"} if timed_out else ended
        if report["status"] not in ("passed", "skipped"):
            log = child.log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:]
            report["log"] = log.replace(f"{ROOT}/", "").replace(f"{sys.prefix}/", "")  # paths of one machine
            print(report["log"], flush=True)
    return {**report, "seconds": round(time.monotonic() - began, 1)}


def run_child(arguments: argparse.Namespace) -> int:
    """Run one stage here, and keep its report in a file."""
    name, path, scratch = arguments.child
    logging.basicConfig(level=logging.INFO)  # why steps are not captured, say
    stage = stages()[name]
    if arguments.device == "cuda" and name != "build":
        torch.zeros(1, device="cuda")
    seconds = float(sys.stdin.readline())  # its turn has come
    deadline = time.monotonic() + seconds

    def save(result: Result, status: str = "running", reason: str = "") -> None:
        beside = Path(f"{path}.tmp")
        beside.write_text(json.dumps({"status": status, "reason": reason, "result": result}), encoding="utf-8")
        os.replace(beside, path)

    context = Context(torch.device(arguments.device), arguments.quick, arguments.data, deadline, save, Path(scratch))
    try:
        result = stage.run(context)
    except SkipStage as reason:
        save({}, "skipped", str(reason))
    except Exception as error:
        traceback.print_exc()
        earlier = json.loads(Path(path).read_text(encoding="utf-8"))["result"] if Path(path).exists() else {}
        save(earlier, "failed", f"{type(error).__name__}: {error}")
    else:
        failures = result.get("failures", [])
        save(result, "failed" if failures else "passed", "; ".join(failures[:3]))
    return 0


def result_name(environment: dict[str, Any]) -> str:
    """``gpu_<name>_<commit>.json`` in letters, digits, ``.``, ``_`` and ``-`` alone.

    Example:
        >>> result_name({"gpu": {"name": "NVIDIA H200"}, "commit": "0123abcd", "machine": {"cpu": "EPYC"}})
        'gpu_nvidia-h200_0123abcd.json'
    """
    name = environment["gpu"]["name"] if environment["gpu"] else "none"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"gpu_{slug}_{environment['commit']}.json"


def _facts(arguments: argparse.Namespace, command: Sequence[str]) -> Report:
    # Imported after the stage `build` has put the module in place that is described here.
    from benchmarks import environment

    return environment.facts(torch.device(arguments.device), command)


def _write(arguments: argparse.Namespace, reports: dict[str, Report], facts: Report) -> list[Path]:
    """Write what there is so far; where."""
    from benchmarks import environment

    whole = arguments.device == "cuda" and not arguments.quick and set(reports) == set(stages())
    paths = [arguments.output or environment.RESULTS / result_name(facts)]
    if os.environ.get("OUT"):
        paths.append(Path(os.environ["OUT"], paths[0].name))
    for path in paths:
        environment.write(path, {"kind": "gpu", "complete": whole, "environment": facts, "stages": reports})
    return paths


def _print(chosen: Sequence[Stage], reports: dict[str, Report]) -> None:
    """The tables last, where the end of a long output is seen."""
    for stage in chosen:
        result = reports[stage.name].get("result")
        if not result:
            continue
        try:
            table = stage.table(result)
        except KeyError:  # a stage that ended before there was anything to show
            continue
        print(f"\n{stage.title}\n{text_table(table)}")
        for failure in result.get("failures", [])[:20]:
            print(f"  FAILED {failure}")
    rows = [(stage.name, reports[stage.name]["seconds"], _verdict(reports[stage.name])) for stage in chosen]
    print(f"\n{text_table((('stage', 'seconds', 'verdict'), rows))}", flush=True)


def _verdict(report: Report) -> str:
    return f"{report['status']}: {report['reason'][:160]}" if report.get("reason") else report["status"]


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and whatever it started and left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small cases and few rounds")
    parser.add_argument("--data", default=os.environ.get("BDFAST_DATA"), help="CIFAR-10 (BDFAST_DATA)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", choices=list(stages()), help=f"of {', '.join(stages())}")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help=f"for everything ({TOTAL_SECONDS:.0f})")
    parser.add_argument("--output", type=Path, help="the result file")
    parser.add_argument("--child", nargs=3, metavar=("STAGE", "FILE", "SCRATCH"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
