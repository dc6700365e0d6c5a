"""Every Triton kernel compiles for GPUs that this machine need not have, and spills no register.

Compilation runs in one subprocess, because in this one Triton may be set to interpret its kernels.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import bdfast.triton_kernels
from tools import kernel_table

CAPABILITY = 90
MODULES = [
    module.name
    for module in pkgutil.iter_modules(bdfast.triton_kernels.__path__)
    if module.name not in ("aot", "channels", "launch", "rows")
]

COMPILE = """
import importlib, json, sys
folder, capability, *modules = sys.argv[1:]
found = []
for module in modules:
    for number, variant in enumerate(importlib.import_module(f"bdfast.triton_kernels.{module}").AOT_VARIANTS):
        assembly = variant.compile(int(capability)).asm
        path = f"{folder}/{module}_{number}.ptx"
        with open(path, "w") as file:
            file.write(assembly["ptx"])
        found.append({"module": module, "variant": str(variant), "ptx": path, "cubin_bytes": len(assembly["cubin"])})
print(json.dumps(found))
"""


@functools.cache
def find_ptxas() -> str | None:
    """ptxas on PATH, or the one that comes with Triton."""
    if found := shutil.which("ptxas"):
        return found
    triton = importlib.import_module("triton")
    bundled = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return str(bundled) if bundled.exists() else None


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("ptx")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(bdfast.triton_kernels.__path__[0]).parents[1])
    command = [sys.executable, "-c", COMPILE, str(folder), str(CAPABILITY), *MODULES]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    found: list[dict[str, str]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_has_a_variant(module: str) -> None:
    """A kernel is whatever is named so; helpers that kernels call start with an underscore."""
    source = importlib.import_module(f"bdfast.triton_kernels.{module}")
    kernels = {name for name in vars(source) if name.endswith("_kernel") and not name.startswith("_")}
    assert kernels == {variant.kernel.__name__ for variant in source.AOT_VARIANTS}


def test_compiles_to_machine_code(compiled: list[dict[str, str]]) -> None:
    assert {item["module"] for item in compiled} == set(MODULES)
    for item in compiled:
        assert int(item["cubin_bytes"]) > 0, item["variant"]
        assert f".target sm_{CAPABILITY}" in Path(item["ptx"]).read_text(), item["variant"]


@pytest.mark.skipif(find_ptxas() is None, reason="needs ptxas, of the CUDA toolkit or of the triton package")
def test_no_register_spills_and_no_stack(compiled: list[dict[str, str]]) -> None:
    # Kernels are tuned with the Triton that the table of kernels names. Another may run out of a register or two: 3.8
    # spills 8 bytes in one variant.
    made_with = json.loads(kernel_table.TABLE.read_text(encoding="utf-8"))["versions"]["triton"]
    allowed = 0 if importlib.metadata.version("triton") == made_with else 16
    for item in compiled:
        command = [str(find_ptxas()), "-v", f"-arch=sm_{CAPABILITY}a", item["ptx"], "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert numbers is not None, report
        assert max(map(int, numbers.groups())) <= allowed, f"{item['variant']}: {report}"
