"""What the compilers of this machine can build: host flags, OpenMP, x86 variants, CUDA and its architectures.

Used by ``setup.py`` and by the maintenance scripts beside this file; standard library only, since a build has neither
torch nor bdfast to import.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


class BuildError(SystemExit):
    """Stops a build with one sentence: what was expected, what was found, what to do."""


# --- host compiler ----------------------------------------------------------------------------------------------------

HOST_FLAGS = (
    *("-O3", "-std=c++17", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # Kernels read neither errno nor the floating-point status flags; without them loops over sqrt, exp and compare
    # vectorise. Nothing here reorders arithmetic or assumes finite values, so no -ffast-math.
    *("-fno-math-errno", "-fno-trapping-math"),
)

# One compilation of csrc/cpu per instruction set; bindings choose among them when the module is loaded. The order is
# the link order, and it matters: the linker keeps the first copy of every inline function, so that baseline code never
# calls a copy compiled for a newer processor.
ISA_FLAGS: Mapping[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
}


def host_compiler(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The C++ compiler as a command: ``$CXX``, else the first of c++, g++ and clang++ on PATH."""
    if command := environ.get("CXX", "").split():
        if shutil.which(command[0], path=environ.get("PATH")) is None:
            raise BuildError(
                f"setup.py: `CXX` expected a C++17 compiler, got {command[0]}, which is not there; "
                f"install it, set CXX to another, or unset CXX to take c++, g++ or clang++"
            )
        return command
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name, path=environ.get("PATH")):
            return [found]
    raise BuildError(
        "setup.py: `CXX` expected a C++17 compiler, got none on PATH; "
        "install g++ (Debian: apt-get install g++) or set CXX"
    )


def compiles(compiler: list[str], flags: Iterable[str], source: str) -> bool:
    """Whether a small program compiles and links into a shared library with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "probe.cpp")
        program.write_text(source)
        command = [*compiler, *flags, "-fPIC", "-shared", str(program), "-o", str(Path(folder, "probe.so"))]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def openmp_flags(compiler: list[str]) -> tuple[str, ...]:
    """``-fopenmp`` where it compiles and links, else ``-fopenmp-simd`` where it compiles, else nothing."""
    runtime = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
    if compiles(compiler, ["-fopenmp"], runtime):
        return ("-fopenmp",)
    if compiles(compiler, ["-fopenmp-simd"], "int one() { return 1; }\n"):
        return ("-fopenmp-simd",)
    return ()


def cpu_variants(compiler: list[str]) -> list[str]:
    """The instruction sets to compile for: all of them on 64-bit x86, baseline alone elsewhere."""
    x86_only = "#ifndef __x86_64__\n#error another processor\n#endif\n#include <immintrin.h>\nint one() { return 1; }\n"
    if all(compiles(compiler, flags, x86_only) for flags in ISA_FLAGS.values()):
        return list(ISA_FLAGS)
    return ["baseline"]


def first_line(command: list[str]) -> str:
    """The first line that a command such as ``g++ --version`` prints."""
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.partition("\n")[0].strip()


# --- CUDA toolkit -----------------------------------------------------------------------------------------------------

# Ampere A100 and RTX 30, Ada, Hopper, Blackwell data centre and RTX 50. Minor revisions in between run their elders'
# code, and anything newer compiles the PTX of the last one.
DEFAULT_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")

NVCC_FLAGS = ("-O3", "-std=c++17", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")


@dataclass(frozen=True)
class Cuda:
    """A usable CUDA toolkit and what to compile with it."""

    nvcc: str
    version: str  # such as "13.0"
    architectures: tuple[str, ...]  # compute capabilities without the dot, ascending
    library_folder: str  # holds libcudart_static.a


def find_nvcc(environ: Mapping[str, str] = os.environ) -> str | None:
    """nvcc of ``$CUDA_HOME``, ``$CUDA_PATH``, the usual system folders (newest first), then PATH."""
    roots = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    versioned = sorted(glob.glob("/usr/local/cuda-*"), key=_version_key, reverse=True)
    for root in [*roots, "/usr/local/cuda", *versioned, "/opt/cuda"]:
        if found := shutil.which("nvcc", path=os.path.join(root, "bin")):
            return found
    return shutil.which("nvcc", path=environ.get("PATH"))


def gpu_visible() -> bool:
    """Whether the NVIDIA driver is up and shows a GPU."""
    if os.path.exists("/dev/nvidiactl"):
        return True
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    result = subprocess.run([smi, "-L"], capture_output=True, text=True)
    return result.returncode == 0 and "GPU" in result.stdout


def nvcc_version(nvcc: str) -> str:
    """Release such as ``"13.0"``."""
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", printed)
    return found.group(1) if found else "unknown"


def supported_architectures(nvcc: str) -> set[str]:
    """Compute capabilities nvcc has code generation for, such as ``{"80", "90", "90a"}``."""
    printed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    base = set(re.findall(r"sm_(\d+[af]?)", printed))
    # nvcc lists the plain targets only; the architecture-specific forms exist from 90 on.
    return base | {arch + "a" for arch in base if arch.isdigit() and int(arch) >= 90}


def choose_architectures(requested: str, supported: set[str]) -> tuple[str, ...]:
    """The value of ``BDFAST_CUDA_ARCHS`` as a list, or the default ones that this nvcc can build."""
    if not requested.strip():
        if default := tuple(arch for arch in DEFAULT_ARCHITECTURES if arch in supported):
            return default
        raise BuildError(
            f"setup.py: nvcc expected one that builds any of {', '.join(DEFAULT_ARCHITECTURES)}, got one for "
            f"{', '.join(sorted(supported, key=_version_key))}; install CUDA 12.0 or newer, or set BDFAST_CUDA_ARCHS"
        )
    architectures = [token.replace(".", "") for token in re.split(r"[;,\s]+", requested.strip())]
    if unknown := [arch for arch in architectures if arch not in supported]:
        raise BuildError(
            f"setup.py: `BDFAST_CUDA_ARCHS` expected compute capabilities that nvcc can build "
            f"({', '.join(sorted(supported, key=_version_key))}), got {', '.join(unknown)}; "
            f"set it like BDFAST_CUDA_ARCHS='80;90', or unset it for the default"
        )
    return tuple(sorted(set(architectures), key=_version_key))


def gencode_flags(architectures: tuple[str, ...]) -> list[str]:
    """Machine code for every architecture, and PTX of the newest for processors that come after it."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    newest = architectures[-1]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def static_runtime_folder(nvcc: str) -> str | None:
    """The folder of ``libcudart_static.a``, by nvcc's own account.

    nvcc on PATH may be a wrapper script or a distribution's split package, so its own location says nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("")
        command = [nvcc, "--dryrun", str(source), "-o", str(Path(folder, "probe"))]
        plan = subprocess.run(command, capture_output=True, text=True).stderr
    libraries = next((line for line in plan.splitlines() if line.startswith("#$ LIBRARIES=")), "")
    # Quoted or bare; a distribution's own package prints none and puts the library in the linker's default folder.
    folders: list[tuple[str, str]] = re.findall(r'"-L([^"]+)"|-L(\S+)', libraries)
    defaults = glob.glob("/usr/lib/*-linux-gnu")
    for candidate in [*(quoted or bare for quoted, bare in folders), *defaults, "/usr/lib64", "/usr/lib"]:
        if os.path.exists(os.path.join(candidate, "libcudart_static.a")):
            return os.path.realpath(candidate)
    return None


def find_cuda(environ: Mapping[str, str] = os.environ) -> tuple[Cuda | None, str]:
    """The toolkit to build with, or ``None`` and the reason, following ``BDFAST_CUDA``.

    Unset, CUDA is built where both nvcc and a GPU are there, so that a laptop or a CI machine that happens to have the
    toolkit does not spend minutes on code it cannot run.
    """
    switch = environ.get("BDFAST_CUDA", "").strip()
    if switch not in ("", "0", "1"):
        raise BuildError(
            f"setup.py: `BDFAST_CUDA` expected 0 or 1, got {switch!r}; "
            f"set 1 to require the CUDA kernels, 0 to leave them out, or unset it to build them where a GPU is visible"
        )
    if switch == "0":
        return None, "BDFAST_CUDA=0"
    if switch == "" and not gpu_visible():
        return None, "no GPU is visible; set BDFAST_CUDA=1 to build the CUDA kernels all the same"
    nvcc = find_nvcc(environ)
    library_folder = static_runtime_folder(nvcc) if nvcc else None
    if nvcc is None or library_folder is None:
        missing = (
            f"{nvcc} without libcudart_static.a" if nvcc else "no nvcc in CUDA_HOME, CUDA_PATH, /usr/local or PATH"
        )
        remedy = "install the CUDA toolkit (12.0 or newer), set CUDA_HOME to its folder and install again"
        if switch == "1":
            raise BuildError(
                f"setup.py: `BDFAST_CUDA=1` expected nvcc and the static CUDA runtime, got {missing}; {remedy}, "
                f"or unset BDFAST_CUDA to build without the CUDA kernels"
            )
        return None, f"{missing}; the cpp and reference backends, and triton where installed, remain; {remedy}"
    architectures = choose_architectures(environ.get("BDFAST_CUDA_ARCHS", ""), supported_architectures(nvcc))
    return Cuda(nvcc, nvcc_version(nvcc), architectures, library_folder), ""


def _version_key(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
