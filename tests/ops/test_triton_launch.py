"""Quick launches start the very kernel that Triton would, with the same arguments."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
HOW = ("same kernel", "same grid, stream and function", "same arguments", "as many", "second is quick")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.ops.launches_without_a_gpu"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    findings: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    if not findings["known"]:
        pytest.skip(f"Triton {importlib.metadata.version('triton')} launches in another way: launches are plain")
    return findings


def test_starts_what_triton_starts(found: dict[str, Any]) -> None:
    wrong = {name: [how for how in HOW if not case[how]] for name, case in found["cases"].items()}
    assert not {name: hows for name, hows in wrong.items() if hows}


def test_the_cases_tell_kernels_apart(found: dict[str, Any]) -> None:
    """Else the comparison would show little."""
    kernels = {name: case["kernel"] for name, case in found["cases"].items()}
    for alike in (("aligned", "other memory", "aligned to 16", "empty", "parameter", "factor 1"), ("16", "48", "0")):
        assert len({kernels[f"{name}, device 0"] for name in alike}) == 1
    apart = ("aligned", "first unaligned", "second unaligned", "both unaligned", "bfloat16", "1", "16", "2^31", "warps")
    assert len({kernels[f"{name}, device {device}"] for name in apart for device in (0, 1)}) == 2 * len(apart)


def test_profilers_hear_of_launches(found: dict[str, Any]) -> None:
    assert found["hooks"]["heard"] == ["scale_kernel"]
    assert found["hooks"]["exit"]
    assert found["hooks"]["before"] == 1
    assert found["hooks"]["quiet"] == [None, None, None]


def test_debugging_compiles_anew(found: dict[str, Any]) -> None:
    assert found["hooks"]["debug"]
