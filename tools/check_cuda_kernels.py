"""Compiles every CUDA kernel and fails on register spills and stack frames that nobody has given a reason for.

    python tools/check_cuda_kernels.py [--archs "80;90"] [SOURCE ...]

A kernel that spills runs, and its tests pass, several times slower than it was written for: only ptxas says so. What is
accepted stands in ``cuda_kernels_allowed.txt`` with its reason; an entry that is no longer needed fails as well. Needs
nvcc, no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, only this file's folder is there
from tools import toolchain  # noqa: E402

ALLOWED = Path(__file__).with_name("cuda_kernels_allowed.txt")


@dataclass(frozen=True)
class Usage:
    """What ptxas reports for one function on one architecture."""

    name: str  # mangled
    arch: str
    stack: int  # bytes
    spill: int  # bytes, stores and loads together
    registers: int | None  # None: a device function that was not inlined


def parse(report: str) -> list[Usage]:
    """The functions in the output of ``ptxas -v``."""
    found: list[Usage] = []
    arch = name = ""
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            arch = entry[2]
        elif properties := re.search(r"Function properties for (\S+)", line):
            name = properties[1]
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found.append(Usage(name, arch, int(frame[1]), int(frame[2]) + int(frame[3]), None))
        elif (used := re.search(r"Used (\d+) registers", line)) and found:
            last = found[-1]
            found[-1] = Usage(last.name, last.arch, last.stack, last.spill, int(used[1]))
    return found


def compile_source(source: Path, cuda: toolchain.Cuda) -> list[Usage]:
    """Compiles one .cu file and returns what its kernels use.

    Raises:
        toolchain.BuildError: nvcc refuses the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "kernel.o")
        flags = [*toolchain.NVCC_FLAGS, *toolchain.gencode_flags(cuda.architectures), "-I", str(ROOT / "csrc/include")]
        command = [cuda.nvcc, *flags, "-Xptxas", "-v", "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise toolchain.BuildError(f"{source}: nvcc stopped\n{result.stdout}{result.stderr}")
    return parse(result.stdout + result.stderr)


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Mangled to readable names; the names themselves where no c++filt is installed."""
    ordered = sorted(set(names))
    tool = shutil.which("c++filt")
    if tool is None or not ordered:
        return {name: name for name in ordered}
    result = subprocess.run([tool, *ordered], capture_output=True, text=True, check=True)
    return dict(zip(ordered, result.stdout.splitlines(), strict=True))


def short_name(signature: str) -> str:
    """``void bdfast::isa_cuda::(anonymous namespace)::k<float, 4>(float*)`` as ``k<float, 4>``."""
    text = signature.replace("(anonymous namespace)", "anonymous")
    depth, begin, end = 0, 0, len(text)
    for position, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if depth == 0 and letter in ": ":
            begin = position + 1
        if depth == 0 and letter == "(":
            end = position
            break
    return text[begin:end]


def read_allowed(text: str) -> dict[str, tuple[int, int, str]]:
    """Kernel (without template arguments) to the stack and spill bytes accepted, and why."""
    allowed = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split(maxsplit=3)
        if len(fields) < 4 or not (fields[1].isdigit() and fields[2].isdigit()):
            raise toolchain.BuildError(
                f"{ALLOWED.name}:{number}: expected 'kernel stack-bytes spill-bytes reason', got {line!r}; "
                f"write a reason that a reader can check"
            )
        allowed[fields[0]] = (int(fields[1]), int(fields[2]), fields[3])
    return allowed


def findings(usages: list[Usage], names: dict[str, str], allowed: dict[str, tuple[int, int, str]]) -> list[str]:
    """One sentence for each kernel over its allowance and for each allowance that nothing needs."""
    found, needed = [], set()
    for usage in usages:
        kernel = short_name(names[usage.name]).partition("<")[0]
        stack, spill, _ = allowed.get(kernel, (0, 0, ""))
        if usage.stack or usage.spill:
            needed.add(kernel)
        if usage.stack > stack or usage.spill > spill:
            found.append(
                f"{kernel} ({usage.arch}): at most {stack} bytes of stack and {spill} of spills expected, "
                f"got {usage.stack} and {usage.spill}; use fewer live values, or give the reason in {ALLOWED.name}"
            )
    unused = sorted(set(allowed) - needed)
    return found + [
        f"{ALLOWED.name}: {kernel} needs no stack and no spills any more; remove its line" for kernel in unused
    ]


def table(usages: list[Usage], names: dict[str, str]) -> str:
    """Kernel, architecture, registers, spilled bytes, stack bytes."""
    rows = [("kernel", "arch", "regs", "spill", "stack")]
    for usage in sorted(usages, key=lambda u: (short_name(names[u.name]), u.arch)):
        registers = "-" if usage.registers is None else str(usage.registers)
        rows.append((short_name(names[usage.name]), usage.arch, registers, str(usage.spill), str(usage.stack)))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:<{width}}  {row[1]:>6}  {row[2]:>5}  {row[3]:>6}  {row[4]:>6}" for row in rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sources", nargs="*", type=Path, help="default: every file of csrc/cuda")
    parser.add_argument("--archs", default="80;90", help="compute capabilities (default: %(default)s)")
    options = parser.parse_args(arguments)
    sources = options.sources or sorted((ROOT / "csrc/cuda").glob("*.cu"))
    cuda, reason = toolchain.find_cuda({**os.environ, "BDFAST_CUDA": "1", "BDFAST_CUDA_ARCHS": options.archs})
    assert cuda is not None, reason
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        usages = [usage for found in pool.map(lambda source: compile_source(source, cuda), sources) for usage in found]
    names = demangle(usage.name for usage in usages)
    print(table(usages, names))
    allowed = read_allowed(ALLOWED.read_text())
    if options.sources:  # some files only: the others' allowances are not stale
        seen = {short_name(name).partition("<")[0] for name in names.values()}
        allowed = {kernel: limits for kernel, limits in allowed.items() if kernel in seen}
    problems = findings(usages, names, allowed)
    print("\n".join(problems) if problems else f"{len(usages)} kernel builds, no unexpected spill or stack frame")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
