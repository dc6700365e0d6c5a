"""A table of what every GPU kernel compiles to, kept beside the code: regressions show without a GPU.

    python tools/kernel_table.py                       compile, and compare with tools/kernel_table.json
    python tools/kernel_table.py --write               compile for every architecture, and write the table
    python tools/kernel_table.py --markdown FILE       write the table that is kept as Markdown

Compared are registers, stack frames, the widest load and store, atomics and the length of the code. What other
compilers make of the same code differs: with versions that the table was not made with, differences in stack frames and
widths alone are listed, and are no failure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, only this file's folder is there
from tools import disassembly, toolchain  # noqa: E402
from tools.check_cuda_kernels import demangle, short_name  # noqa: E402
from tools.disassembly import Profile  # noqa: E402

TABLE = Path(__file__).with_suffix(".json")
ARCHITECTURES = ("80", "90", "100")
CHECKED = ("90",)  # what a comparison compiles unless told otherwise
MORE_REGISTERS = 8
LONGER = 1.25
Profiles = dict[str, dict[str, Profile]]  # kernel -> architecture -> profile


def main(arguments: list[str]) -> int:
    """0 where nothing is worse than in the table."""
    options = _parser().parse_args(arguments)
    kept = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"versions": {}, "kernels": {}}
    if options.markdown is not None:
        options.markdown.write_text(markdown(kept), encoding="utf-8")
        return 0
    if not options.write and not TABLE.exists():
        print(f"no {TABLE.name} yet: nothing to compare with; write it with python tools/kernel_table.py --write")
        return 0
    cuobjdump, nvcc = disassembly.find_cuobjdump(), toolchain.find_nvcc()
    if cuobjdump is None or nvcc is None:
        print("no nvcc or no cuobjdump here: nothing is compiled")
        return 0
    architectures = ARCHITECTURES if options.write else tuple(options.archs)
    found = compile_all(architectures, nvcc, cuobjdump)
    if options.write:
        content = {"versions": versions(nvcc), "kernels": _records(found)}
        TABLE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {TABLE.relative_to(ROOT)}: {len(found)} kernels")
        return 0
    here = versions(nvcc)
    exact = here == kept["versions"]
    problems = compare(found, _profiles(kept["kernels"]), exact=exact)
    print("\n".join(problems) if problems else f"{len(found)} kernels, none worse than in {TABLE.name}")
    if not exact:
        print(
            f"{TABLE.name} was made with {_listed(kept['versions'])}, and this run with {_listed(here)}: "
            "differences may come from these and are no failure"
        )
    return 1 if problems and exact else 0


def versions(nvcc: str) -> dict[str, str]:
    """Of the compilers."""
    triton = importlib.import_module("triton")
    return {"nvcc": toolchain.nvcc_version(nvcc), "triton": triton.__version__}


def _listed(versions_of: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions_of.items())


def compile_all(architectures: tuple[str, ...], nvcc: str, cuobjdump: str) -> Profiles:
    """Every kernel of csrc/cuda and csrc/triton."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            (source, architecture)
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))
            for architecture in architectures
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            cubins = list(pool.map(lambda job: _nvcc(nvcc, job[0], job[1], Path(folder)), jobs))
        found: Profiles = {}
        for (_, architecture), cubin in zip(jobs, cubins, strict=True):
            parts = disassembly.profiles(cubin, cuobjdump)
            readable = demangle(parts)
            for name, profile in parts.items():
                found.setdefault(f"cuda {short_name(readable[name])}", {})[architecture] = profile
        for architecture in architectures:
            for variant, cubin in compile_triton(architecture, Path(folder)):
                (profile,) = disassembly.profiles(cubin, cuobjdump).values()
                found.setdefault(f"triton {variant}", {})[architecture] = profile
    return dict(sorted(found.items()))


def _nvcc(nvcc: str, source: Path, architecture: str, folder: Path) -> Path:
    target = folder / f"{source.stem}_{architecture}.cubin"
    command = [nvcc, *toolchain.NVCC_FLAGS, f"-arch=sm_{architecture}", "-cubin", "-I", str(ROOT / "csrc/include")]
    result = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True)
    if result.returncode:
        raise toolchain.BuildError(f"{source}: nvcc stopped\n{result.stdout}{result.stderr}")
    return target


def compile_triton(architecture: str, folder: Path) -> list[tuple[str, Path]]:
    """Variant -> cubin, made in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).resolve()), "--triton", architecture, str(folder)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [(name, Path(path)) for name, path in json.loads(printed.splitlines()[-1])]


def _compile_triton_here(architecture: str, folder: Path) -> None:
    kernels = importlib.import_module("bdfast.triton_kernels")
    made: list[tuple[str, str]] = []
    for module in pkgutil.iter_modules(kernels.__path__):
        source = importlib.import_module(f"{kernels.__name__}.{module.name}")
        for number, variant in enumerate(getattr(source, "AOT_VARIANTS", ())):
            path = folder / f"{module.name}_{number}_{architecture}.cubin"
            path.write_bytes(variant.compile(int(architecture)).asm["cubin"])
            made.append((str(variant), str(path)))
    print(json.dumps(made))


def compare(found: Profiles, kept: Profiles, *, exact: bool) -> list[str]:
    """A sentence for everything that is worse than in the table, and for kernels that it does not know.

    Example:
        >>> before = Profile(32, 0, 0, 100, {"16": 4}, {"16": 2}, {"float": 8})
        >>> after = Profile(32, 0, 0, 100, {"4": 16}, {"16": 2}, {"float": 8})
        >>> compare({"k": {"90": after}}, {"k": {"90": before}}, exact=True)
        ['k (sm_90): loads of 16 bytes expected, got 4']
    """
    problems = []
    for name, by_architecture in found.items():
        for architecture, profile in by_architecture.items():
            before = kept.get(name, {}).get(architecture)
            where = f"{name} (sm_{architecture})"
            if before is None:
                problems.append(f"{where}: not in {TABLE.name}; run python tools/kernel_table.py --write")
            else:
                problems += [f"{where}: {text}" for text in _worse(profile, before, exact)]
    gone = sorted(set(kept) - set(found))
    return problems + [f"{name}: in {TABLE.name} and no longer in the code; run it with --write" for name in gone]


def _worse(profile: Profile, before: Profile, exact: bool) -> list[str]:
    found = []
    if profile.stack > before.stack:
        found.append(f"{before.stack} bytes of stack expected, got {profile.stack}")
    for moves in ("loads", "stores"):
        if profile.widest(moves) < before.widest(moves):
            found.append(f"{moves} of {before.widest(moves)} bytes expected, got {profile.widest(moves)}")
    if exact and profile.kinds.get("atomic", 0) > before.kinds.get("atomic", 0):
        found.append(f"{before.kinds.get('atomic', 0)} atomics expected, got {profile.kinds['atomic']}")
    if exact and profile.registers > before.registers + MORE_REGISTERS:
        found.append(f"{before.registers} registers expected, got {profile.registers}")
    if exact and profile.instructions > LONGER * before.instructions:
        found.append(f"about {before.instructions} instructions expected, got {profile.instructions}")
    return found


def markdown(kept: dict[str, Any]) -> str:
    """The table, a line a kernel and architecture."""
    head = "| kernel | sm | registers | stack | instructions | loads | stores | float | double | special | atomic |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, by_architecture in _profiles(kept["kernels"]).items():
        for architecture, p in by_architecture.items():
            moves = [", ".join(f"{count} x {size} B" for size, count in m.items()) for m in (p.loads, p.stores)]
            kinds = [str(p.kinds.get(kind, 0)) for kind in ("float", "double", "special", "atomic")]
            cells = [f"`{name}`", architecture, str(p.registers), str(p.stack), str(p.instructions), *moves, *kinds]
            lines.append("| " + " | ".join(re.sub(r"\|", r"\\|", cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _records(found: Profiles) -> dict[str, dict[str, dict[str, object]]]:
    return {name: {arch: p.record() for arch, p in by_arch.items()} for name, by_arch in found.items()}


def _profiles(records: dict[str, dict[str, Any]]) -> Profiles:
    return {name: {arch: Profile(**p) for arch, p in by_arch.items()} for name, by_arch in records.items()}


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=ARCHITECTURES, default=list(CHECKED))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    if sys.argv[1:2] == ["--triton"]:  # the child of compile_triton
        _compile_triton_here(sys.argv[2], Path(sys.argv[3]))
        raise SystemExit(0)
    raise SystemExit(main(sys.argv[1:]))
