"""Every CUDA source compiles for Hopper without warnings and spills no register."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda_on_cpu.library import INCLUDE
from tools import toolchain

SOURCES = sorted((INCLUDE.parent / "cuda").glob("*.cu"))
NVCC = toolchain.find_nvcc()


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_no_register_spills_and_no_stack(source: Path) -> None:
    flags = [*toolchain.NVCC_FLAGS, "-Werror=all-warnings", "-arch=sm_90", "-Xptxas=-v", f"-I{INCLUDE}"]
    command = [str(NVCC), *flags, "-cubin", str(source), "-o", os.devnull]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    reports = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert reports, result.stderr
    assert set(reports) == {("0", "0", "0")}, result.stderr
