"""Builds bdfast with CUDA for the GPU that is there, with the interpreter that holds torch."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time

import torch

from bdfast.testing.tables import Table
from benchmarks.environment import ROOT
from benchmarks.stage import Context, Result, SkipStage, Stage

# No venv and no dependencies: a new environment would not see the torch that is installed, and there may be no network.
INSTALL = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]


def run(context: Context) -> Result:
    """Install, and say what the module was built with."""
    if context.device.type != "cuda":
        raise SkipStage("--device cpu: the module that is installed is used")
    major, minor = torch.cuda.get_device_capability(context.device)
    switches = {"BDFAST_CUDA": "1", "BDFAST_CUDA_ARCHS": os.environ.get("BDFAST_CUDA_ARCHS", f"{major}{minor}")}
    began = time.monotonic()
    subprocess.run(INSTALL, cwd=ROOT, env={**os.environ, **switches}, check=True)
    seconds = time.monotonic() - began
    importlib.invalidate_caches()
    native = importlib.import_module("bdfast._C")
    failures = [] if native.has_cuda else ["the module was built without CUDA"]
    return {"seconds": round(seconds, 1), "switches": switches, "build": native.build_info, "failures": failures}


def table(result: Result) -> Table:
    """One line."""
    return ("what", "value"), [("install, s", result["seconds"]), *result["switches"].items()]


STAGE = Stage("build", "pip install -e . with CUDA", 35.0, run, table)
