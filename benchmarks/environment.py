"""What a result was measured on: machine, versions, commit, command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import bdfast
from bdfast.backends import availability

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def facts(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """Everything that a figure depends on, for the head of a result file."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(command),
        "machine": machine(),
        "gpu": gpu(device),
        "versions": versions(),
    }


def machine() -> dict[str, Any]:
    """The processor, and how much of it was free."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load,
        "system": platform.platform(),
    }


def gpu(device: torch.device) -> dict[str, Any] | None:
    """The GPU that ``device`` is; None for the CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
    }


def versions() -> dict[str, Any]:
    """Of what computes."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in ("triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["bdfast"] = bdfast.__version__
    if availability.cpp_missing() is None:
        native = availability.native()
        found["bdfast._C"] = {"isa": native.cpu_isa, "openmp": native.has_openmp, "cuda": native.has_cuda}
    return found


def commit() -> str:
    """Of the working tree, ``-dirty`` where sources differ from it; what ``BDFAST_COMMIT`` says for a copy of it."""
    if told := os.environ.get("BDFAST_COMMIT"):
        return told
    head = _output(["git", "rev-parse", "--short=10", "HEAD"])
    if head is None:
        return "unknown"
    changed = _output(["git", "status", "--porcelain", "--", "bdfast", "csrc", "benchmarks", ":!benchmarks/results"])
    return f"{head}-dirty" if changed else head


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
