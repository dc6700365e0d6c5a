"""Builds ``bdfast._C``, the one compiled module: C++ for the CPU, and CUDA where there is a toolkit and a GPU.

No file includes a torch header: torch is not needed to build, and one build works with every torch that bdfast
supports.

Environment switches

    BDFAST_CUDA        1: build the CUDA kernels or fail; 0: leave them out; unset: build them if a GPU is visible
    BDFAST_CUDA_ARCHS  compute capabilities such as "90;100"; unset: 80, 86, 89, 90, 100, 120 as far as nvcc goes
    CUDA_HOME          the CUDA toolkit (CUDA_PATH as well); unset: the usual system folders, then nvcc on PATH
    CXX, CXXFLAGS, LDFLAGS           the host compiler and what to add to its flags
    NVCC_CCBIN, NVCC_APPEND_FLAGS    nvcc's own switches; NVCC_APPEND_FLAGS=-lineinfo shows source lines in Nsight
    MAX_JOBS           compilations at a time; unset: as many as there are cores

Other metadata is in pyproject.toml, what the compilers of this machine can do in tools/toolchain.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a PEP 517 build does not put the project's folder there
from tools import toolchain  # noqa: E402

CPU_SOURCES = sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/cpu/*.cpp"))
CUDA_SOURCES = sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/cuda/*.cu"))
BINDINGS = Path("csrc/bindings.cpp")


@dataclass(frozen=True)
class Plan:
    """What is built, decided once from the environment and the machine."""

    version: str
    compiler: list[str]
    cpu_variants: list[str]
    openmp: tuple[str, ...]
    cuda: toolchain.Cuda | None
    cuda_reason: str  # why CUDA is left out; empty when it is built

    @classmethod
    def make(cls, version: str) -> Plan:
        compiler = toolchain.host_compiler()
        cuda, reason = toolchain.find_cuda()
        variants = toolchain.cpu_variants(compiler)
        return cls(version, compiler, variants, toolchain.openmp_flags(compiler), cuda, reason)

    def info(self) -> dict[str, object]:
        """The record compiled into the module, for ``bdfast doctor``."""
        return {
            "compiler": toolchain.first_line([*self.compiler, "--version"]),
            "cpu": self.cpu_variants,
            "openmp": self.openmp == ("-fopenmp",),
            "nvcc": self.cuda.version if self.cuda else None,
            "cuda_architectures": list(self.cuda.architectures) if self.cuda else [],
            "cuda_left_out": self.cuda_reason or None,
        }

    def summary(self) -> str:
        """The few lines that end a build."""
        threads = "yes" if self.openmp == ("-fopenmp",) else "no: the compiler has none, kernels run on one thread"
        cuda = f"left out: {self.cuda_reason}"
        if self.cuda:
            cuda = f"{' '.join(self.cuda.architectures)} and PTX, nvcc {self.cuda.version} ({self.cuda.nvcc})"
        return (
            f"bdfast {self.version} built\n"
            f"  compiler  {toolchain.first_line([*self.compiler, '--version'])}\n"
            f"  CPU       {', '.join(self.cpu_variants)}\n"
            f"  OpenMP    {threads}\n"
            f"  CUDA      {cuda}\n"
        )


class BuildExtension(build_ext):
    """Compiles through ninja: in parallel, and after a change only what the change touches."""

    def build_extension(self, ext: Extension) -> None:
        plan = Plan.make(self.distribution.get_version())
        # Not build_temp, which an editable install throws away.
        folder = Path("build", f"ninja-{sysconfig.get_config_var('SOABI')}")
        folder.mkdir(parents=True, exist_ok=True)
        module = folder / "_C.so"
        script = folder / "build.ninja"
        script.write_text(ninja_file(plan, folder, module))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([find_ninja(), "-f", str(script), *jobs]).returncode:
            raise toolchain.BuildError("setup.py: the compiler stopped with the error above (pip shows it with -v)")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, target)
        Path("build/summary.txt").write_text(plan.summary())
        print(plan.summary(), flush=True)


class BuildExtensionWindows(build_ext):
    """Baseline C++ through setuptools' own MSVC support: no instruction-set variants and no CUDA there."""

    def build_extension(self, ext: Extension) -> None:
        version = self.distribution.get_version()
        info = {
            "compiler": "MSVC",
            "cpu": ["baseline"],
            "openmp": True,
            "nvcc": None,
            "cuda_architectures": [],
            "cuda_left_out": "Windows builds have the cpp backend only; use WSL for CUDA",
        }
        ext.define_macros = [
            ("BDFAST_ISA", "baseline"),
            ("BDFAST_VERSION", c_string(version)),
            ("BDFAST_BUILD_INFO", c_string(json.dumps(info))),
        ]
        ext.include_dirs = ["csrc/include", pybind11_include()]
        ext.extra_compile_args = ["/O2", "/std:c++17", "/EHsc", "/openmp"]
        super().build_extension(ext)


def ninja_file(plan: Plan, folder: Path, module: Path) -> str:
    """The whole build as one ninja file, with paths relative to the project's folder."""
    environment = {name: shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS")}
    host = [*plan.compiler, *toolchain.HOST_FLAGS, *plan.openmp, *environment["CXXFLAGS"], "-Icsrc/include"]
    rules = [
        rule("host", [*host, "$flags", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"], "C++  $out", depfile=True)
    ]
    macros = [
        f"-DBDFAST_VERSION={c_string(plan.version)}",
        f"-DBDFAST_BUILD_INFO={c_string(json.dumps(plan.info()))}",
        *(["-DBDFAST_X86_ISAS=1"] if "avx512" in plan.cpu_variants else []),
        *(["-DBDFAST_WITH_CUDA=1"] if plan.cuda else []),
    ]
    # Warnings of pybind11 and Python are not ours: -isystem.
    includes = [f"-isystem{path}" for path in (pybind11_include(), python_include())]
    objects = [folder / "bindings.o"]
    edges = [edge("host", objects[0], BINDINGS, [*macros, *includes])]
    for variant in plan.cpu_variants:
        for source in CPU_SOURCES:
            objects.append(folder / f"{source.stem}.{variant}.o")
            flags = [f"-DBDFAST_ISA={variant}", *toolchain.ISA_FLAGS[variant]]
            edges.append(edge("host", objects[-1], source, flags))
    libraries: list[str] = []
    if plan.cuda:
        rules.append(rule("nvcc", nvcc_command(plan, plan.cuda), "CUDA $out", depfile=True))
        for source in CUDA_SOURCES:
            objects.append(folder / f"{source.stem}.cuda.o")
            edges.append(edge("nvcc", objects[-1], source, []))
        # The runtime is linked statically and hidden: the module loads where there is no driver, and it never mixes
        # with the CUDA runtime that torch brings.
        libraries = [f"-L{plan.cuda.library_folder}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        libraries += ["-Wl,--exclude-libs,ALL"]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    link = [*plan.compiler, *shared, "$in", "-o", "$out", *plan.openmp, *environment["LDFLAGS"], *libraries]
    rules.append(rule("link", link, "Link $out"))
    edges.append(edge("link", module, objects, []))
    return "\n".join([f"builddir = {escape(str(folder))}", *rules, *edges, ""])


def nvcc_command(plan: Plan, cuda: toolchain.Cuda) -> list[str]:
    """nvcc; its host compiler is that of the C++ files if CXX is one word, and its own switch comes first."""
    host = [] if os.environ.get("NVCC_CCBIN") or len(plan.compiler) > 1 else ["-ccbin", plan.compiler[0]]
    flags = [*host, *toolchain.NVCC_FLAGS, *toolchain.gencode_flags(cuda.architectures), "-Icsrc/include"]
    return [cuda.nvcc, *flags, "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]


def rule(name: str, command: list[str], description: str, *, depfile: bool = False) -> str:
    words = [word if word.startswith("$") else quote(word) for word in command]
    lines = [f"rule {name}", f"  command = {' '.join(words)}", f"  description = {description}"]
    return "\n".join([*lines, "  depfile = $out.d", "  deps = gcc", ""] if depfile else [*lines, ""])


def edge(rule_name: str, output: Path, sources: Path | list[Path], flags: list[str]) -> str:
    inputs = sources if isinstance(sources, list) else [sources]
    line = f"build {escape(str(output))}: {rule_name} {' '.join(escape(str(path)) for path in inputs)}"
    return f"{line}\n  flags = {' '.join(quote(flag) for flag in flags)}"


def quote(word: str) -> str:
    """A word of a command, for the shell and then for ninja."""
    return shlex.quote(word).replace("$", "$$")


def escape(path: str) -> str:
    """A path in a ninja build line."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def c_string(text: str) -> str:
    """A C string literal."""
    return json.dumps(text)


def find_ninja() -> str:
    """ninja on PATH, or the one of the ``ninja`` package."""
    if found := shutil.which("ninja"):
        return found
    if importlib.util.find_spec("ninja"):
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    raise toolchain.BuildError(
        "setup.py: `ninja` expected on PATH or as a package, got neither; run: pip install ninja"
    )


def python_include() -> str:
    """The folder of Python's headers, which Linux distributions package apart from Python."""
    folder = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(folder, "Python.h")):
        raise toolchain.BuildError(
            f"setup.py: Python.h expected in {folder}, got none; "
            f"install Python's development package (Debian: apt-get install python3-dev)"
        )
    return folder


def pybind11_include() -> str:
    """The folder of pybind11's headers."""
    if importlib.util.find_spec("pybind11") is None:
        raise toolchain.BuildError(
            "setup.py: `pybind11` expected in the build environment, got none; "
            "run: pip install pybind11, or install without --no-build-isolation"
        )
    import pybind11

    return str(pybind11.get_include())


setup(
    license="Apache-2.0",
    ext_modules=[Extension("bdfast._C", [str(path) for path in (BINDINGS, *CPU_SOURCES)])],
    cmdclass={"build_ext": BuildExtensionWindows if sys.platform == "win32" else BuildExtension},
)
