"""Compiles a CUDA source with g++ over ``cuda_on_cpu.h``: its logic is tested where there is no GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
INCLUDE = HERE.parents[1] / "csrc" / "include"


def build(name: str, folder: Path) -> ctypes.CDLL:
    """The shared library of ``tests/cuda_on_cpu/<name>.cpp``, which includes ``csrc/cuda/<name>.cu``."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = folder / f"{name}.so"
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    includes = [f"-I{INCLUDE}", f"-I{HERE}"]
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        *warnings,
        "-shared",
        "-fPIC",
        "-DBDFAST_ISA=cuda",
        "-U_FORTIFY_SOURCE",
        *includes,
    ]
    result = subprocess.run([*command, str(HERE / f"{name}.cpp"), "-o", str(library)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))
