"""``bdfast doctor``: what runs where, and whether it is right."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from bdfast.cli import artefact, environment
from bdfast.cli.checks import SECONDS, Check, Choice, choices, numeric_checks
from bdfast.cli.command import DONE, FINDING, Command
from bdfast.cli.outputs import to_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--artefact", metavar="PATH", help="look into a checkpoint or a record instead")
    parser.add_argument("--thorough", action="store_true", help="run every small case, however long it takes")


def run(options: argparse.Namespace) -> int:
    """Look at everything, print it, and say 1 if something is wrong."""
    if options.artefact is not None:
        inspection = artefact.inspect(Path(options.artefact))
        print(to_json(inspection) if options.json else artefact.text(inspection))
        return artefact.exit_code(inspection)
    chosen = list(choices())
    checks = numeric_checks(float("inf") if options.thorough else SECONDS)
    gpu = environment.gpu()
    found = {
        "versions": environment.versions(),
        "extension": environment.extension(),
        "cpu": environment.cpu(),
        "gpu": gpu,
        "extras": environment.extras(),
        "ops": [asdict(choice) for choice in chosen],
        "checks": [asdict(check) for check in checks],
        "findings": findings(chosen, checks, gpu),
    }
    print(to_json(found) if options.json else text(found, chosen, checks))
    return FINDING if found["findings"] else DONE


def findings(chosen: Sequence[Choice], checks: Sequence[Check], gpu: Mapping[str, Any]) -> list[str]:
    """What is wrong here, in sentences. A machine without a GPU is as it should be."""
    found = [choice.fault for choice in chosen if choice.fault is not None]
    for check in checks:
        found += [f"{check.op} on {check.backend}: wrong numbers: {mismatch}" for mismatch in check.mismatches]
    if gpu["device_files"] and not gpu["devices"]:
        build = f"CUDA {gpu['torch_cuda']}" if gpu["torch_cuda"] else "no CUDA"
        found.append(
            f"this machine has {gpu['device_files']} NVIDIA GPU(s) that torch (built with {build}) cannot use; install "
            "a torch whose CUDA the driver supports"
        )
    return found


def text(found: Mapping[str, Any], chosen: Sequence[Choice], checks: Sequence[Check]) -> str:
    """The report for people."""
    lines = [_section("versions"), *_pairs(found["versions"])]
    lines += [_section("compiled extension"), *_pairs(found["extension"])]
    lines += [_section("processor"), *_pairs(found["cpu"])]
    lines += [_section("GPU"), *_gpu(found["gpu"])]
    lines += [_section("optional packages"), *_extras(found["extras"])]
    lines += [_section("ops"), *_ops(chosen)]
    lines += [_section("numbers against the float64 reference (small cases, times dtypes)"), *map(_check_line, checks)]
    faults = found["findings"]
    lines += ["", *(f"FINDING: {fault}" for fault in faults)]
    lines.append(f"{len(faults)} finding(s)" if faults else "all good")
    return "\n".join(lines).lstrip("\n")


def _section(name: str) -> str:
    return f"\n{name}"


def _pairs(values: Mapping[str, Any]) -> Iterable[str]:
    return (f"  {name:<18} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, (list, tuple)) else str(value)


def _gpu(gpu: Mapping[str, Any]) -> list[str]:
    lines = [f"  {i}: {d['name']}, sm_{d['capability']}, {d['memory_gib']} GiB" for i, d in enumerate(gpu["devices"])]
    lines = lines or ["  none visible"]
    return [*lines, f"  driver {gpu['driver'] or 'none'}, torch built with CUDA {gpu['torch_cuda'] or 'none'}"]


def _extras(extras: Mapping[str, str | None]) -> list[str]:
    lines = []
    for name, version in extras.items():
        extra, purpose = environment.EXTRAS[name]
        missing = f"missing ({purpose}): pip install 'bdfast[{extra}]'"
        lines.append(f"  {name:<18} {version or missing}")
    return lines


def _ops(chosen: Sequence[Choice]) -> list[str]:
    """An op and device a line, its dtypes together where they run alike, and why faster backends do not run."""
    lines = []
    for op, of_op in groupby(chosen, key=lambda choice: choice.op):
        lines.append(f"  {op}")
        for (device, backend), alike in groupby(of_op, key=lambda choice: (choice.device, choice.chosen)):
            group = list(alike)
            dtypes = ", ".join(choice.dtype for choice in group)
            lines.append(f"    {device:<5} {backend or 'cannot run':<10} {dtypes}")
            lines += [f"            {name}: {why}" for name, why in group[0].reasons.items() if why is not None]
    return lines


def _check_line(check: Check) -> str:
    verdict = f"{len(check.mismatches)} WRONG" if check.mismatches else "right"
    return (
        f"  {check.op:<24} {check.backend:<10} {check.device:<5} {verdict:<8} ({check.checked} of {check.total} cases)"
    )


COMMAND = Command(
    name="doctor",
    summary="which backend runs each op here and why, and whether its numbers are right",
    description=(
        "Print versions, hardware, the backend that each op takes and why not the others, and compare every backend\n"
        "that runs with the float64 reference. Exits with 1 if a number is wrong or an op falls back to plain\n"
        "PyTorch unasked; a machine without a GPU is no such fallback.\n\n"
        "With --artefact: what a file or a record is, what it claims, what was refused. Exits with 1 if it asks to\n"
        "run something, with 2 if it was not read to its end. That nothing was found does not make a model safe."
    ),
    example="  bdfast doctor\n  bdfast doctor --json > doctor.json\n  bdfast doctor --artefact record/badnet_0_1",
    add_arguments=add_arguments,
    run=run,
    finding="a finding",
)
