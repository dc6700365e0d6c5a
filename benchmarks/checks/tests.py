"""Runs the tests that need a GPU; what the others say of ops, the stage ``numerics`` says of the device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bdfast.testing.tables import Table
from benchmarks.environment import ROOT
from benchmarks.stage import Context, Result, Stage

FOLDERS = ("tests/ops", "tests/runtime", "tests/training", "tests/attacks")
WORKERS = "4"


def run(context: Context) -> Result:
    """Counts, and the names of the tests that failed."""
    selection = ["-m", "gpu and not slow and not large"]
    if context.device.type != "cuda":  # to see that the stage runs
        selection = ["-m", "not slow and not large", "-k", "by_hand"]
    if importlib.util.find_spec("xdist") is not None and not context.quick:
        selection += ["-n", WORKERS, "--dist", "worksteal"]
    environment = {**os.environ, "BDFAST_TEST_DEVICES": context.device.type}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", *FOLDERS, *selection, f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if not report.exists():
            return {"failures": [f"pytest ended with exit code {code} and wrote no report"]}
        return summary(report)


def summary(report: Path) -> Result:
    """What a JUnit report says."""
    # Written by the pytest that this stage ran, in a folder of its own.
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {"passed": passed, "skipped": counts["skipped"], "failures": failed}


def table(result: Result) -> Table:
    """Counts."""
    line = (result.get("passed"), result.get("skipped"), len(result["failures"]))
    return ("passed", "skipped", "failed"), [line]


STAGE = Stage("tests", "tests that need a GPU", 50.0, run, table, timed=False)
