"""The C++ sources are valid for clang, too."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tools import toolchain

ROOT = Path(__file__).resolve().parents[2]
CLANG = shutil.which("clang++")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CLANG is None, reason="needs clang++")]


def complaints(source: Path, *flags: str) -> str:
    command = [str(CLANG), *toolchain.HOST_FLAGS, *toolchain.openmp_flags([str(CLANG)]), "-Icsrc/include"]
    command += ["-fsyntax-only", "-Werror", *flags, str(source)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr


@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/cpu/*.cpp")), ids=lambda path: path.stem)
def test_kernels(source: Path) -> None:
    for variant in toolchain.cpu_variants([str(CLANG)]):
        assert complaints(source, f"-DBDFAST_ISA={variant}", *toolchain.ISA_FLAGS[variant]) == ""


def test_bindings() -> None:
    pybind11 = pytest.importorskip("pybind11")
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-DBDFAST_X86_ISAS=1"] if "avx512" in toolchain.cpu_variants([str(CLANG)]) else []
    assert complaints(ROOT / "csrc" / "bindings.cpp", *flags, *includes) == ""
