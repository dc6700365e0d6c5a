"""Discovery of compilers and of the CUDA toolkit, on machines that each test makes up."""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path

import pytest

from tools import toolchain

NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 12.8, V12.8.93" ;;
  --list-gpu-code) printf 'sm_80\\nsm_90\\nsm_89\\nsm_120\\nsm_100\\n' ;;
  --dryrun) printf '#$ TOP=x\\n#$ LIBRARIES=  "-L{root}/stubs" "-L{root}/lib"\\n' >&2 ;;
esac
"""


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A folder that answers as a CUDA toolkit would."""
    root = tmp_path / "cuda"
    (root / "bin").mkdir(parents=True)
    (root / "lib").mkdir()
    (root / "lib" / "libcudart_static.a").touch()
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(NVCC.replace("{root}", str(root)))
    nvcc.chmod(0o755)
    return root


@pytest.fixture
def no_system_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the toolkits in this machine's system folders."""
    which = shutil.which

    def elsewhere(name: str, path: str | None = None) -> str | None:
        return (
            None if path is not None and path.startswith(("/usr/local/cuda", "/opt/cuda")) else which(name, path=path)
        )

    monkeypatch.setattr(shutil, "which", elsewhere)


def test_nvcc_of_cuda_home_comes_before_cuda_path_and_path(toolkit: Path, tmp_path: Path) -> None:
    nvcc = str(toolkit / "bin" / "nvcc")
    on_path = {"PATH": str(tmp_path)}
    assert toolchain.find_nvcc({"CUDA_HOME": str(toolkit), "CUDA_PATH": str(tmp_path), **on_path}) == nvcc
    assert toolchain.find_nvcc({"CUDA_HOME": str(tmp_path), "CUDA_PATH": str(toolkit), **on_path}) == nvcc


@pytest.mark.usefixtures("no_system_toolkit")
def test_nvcc_is_found_on_path_and_its_runtime_by_asking_it(toolkit: Path, tmp_path: Path) -> None:
    wrapper = tmp_path / "wrappers" / "nvcc"  # its location says nothing about the toolkit
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    assert toolchain.find_nvcc({"PATH": str(wrapper.parent)}) == str(wrapper)
    assert toolchain.static_runtime_folder(str(wrapper)) == str(toolkit / "lib")


@pytest.mark.usefixtures("no_system_toolkit")
def test_no_nvcc_leaves_cuda_out_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toolchain, "gpu_visible", lambda: True)
    cuda, reason = toolchain.find_cuda({"PATH": str(tmp_path)})
    assert cuda is None
    assert "no nvcc in CUDA_HOME" in reason
    assert "cpp and reference backends" in reason
    assert "set CUDA_HOME" in reason


@pytest.mark.usefixtures("no_system_toolkit")
def test_required_cuda_without_nvcc_is_an_error_in_three_parts(tmp_path: Path) -> None:
    with pytest.raises(
        toolchain.BuildError, match=r"`BDFAST_CUDA=1` expected nvcc .*, got no nvcc .*; install the CUDA"
    ):
        toolchain.find_cuda({"PATH": str(tmp_path), "BDFAST_CUDA": "1"})


def test_a_toolkit_without_the_static_runtime_is_named(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (toolkit / "lib" / "libcudart_static.a").unlink()
    monkeypatch.setattr(glob, "glob", lambda pattern: [])
    if toolchain.static_runtime_folder(str(toolkit / "bin" / "nvcc")) is not None:
        pytest.skip("this machine has libcudart_static.a in the linker's default folder")
    with pytest.raises(toolchain.BuildError, match=r"got .*/bin/nvcc without libcudart_static\.a"):
        toolchain.find_cuda({"CUDA_HOME": str(toolkit), "BDFAST_CUDA": "1"})


def test_cuda_zero_wins_over_toolkit_and_gpu(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "gpu_visible", lambda: True)
    assert toolchain.find_cuda({"CUDA_HOME": str(toolkit), "BDFAST_CUDA": "0"}) == (None, "BDFAST_CUDA=0")


@pytest.mark.parametrize(("switch", "gpu", "built"), [("", True, True), ("", False, False), ("1", False, True)])
def test_cuda_is_built_for_a_visible_gpu_or_on_request(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch, switch: str, gpu: bool, built: bool
) -> None:
    monkeypatch.setattr(toolchain, "gpu_visible", lambda: gpu)
    cuda, reason = toolchain.find_cuda({"CUDA_HOME": str(toolkit), "BDFAST_CUDA": switch})
    if not built:
        assert cuda is None
        assert "no GPU is visible; set BDFAST_CUDA=1" in reason
        return
    assert cuda is not None
    assert reason == ""
    assert cuda.version == "12.8"
    assert cuda.architectures == ("80", "89", "90", "100", "120")  # of the default ones, 86 is not in the list above
    assert cuda.library_folder == os.path.realpath(toolkit / "lib")


def test_a_wrong_switch_is_refused() -> None:
    with pytest.raises(toolchain.BuildError, match=r"`BDFAST_CUDA` expected 0 or 1, got 'yes'; set 1"):
        toolchain.find_cuda({"BDFAST_CUDA": "yes"})


@pytest.mark.parametrize("requested", ["90;80", "8.0, 9.0", "80 90 80"])
def test_architectures_are_read_in_any_usual_spelling(requested: str) -> None:
    assert toolchain.choose_architectures(requested, {"80", "90"}) == ("80", "90")


def test_architectures_are_ordered_as_numbers_so_that_the_newest_gives_the_ptx() -> None:
    chosen = toolchain.choose_architectures("100;90a;80", {"80", "90a", "100"})
    assert chosen == ("80", "90a", "100")
    assert toolchain.gencode_flags(chosen) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_an_architecture_that_nvcc_lacks_is_refused() -> None:
    with pytest.raises(
        toolchain.BuildError, match=r"`BDFAST_CUDA_ARCHS` expected .*\(80, 90\), got 70, x; set it like"
    ):
        toolchain.choose_architectures("70;90;x", {"80", "90"})


def test_an_nvcc_too_old_for_any_default_architecture_is_refused() -> None:
    with pytest.raises(toolchain.BuildError, match=r"nvcc expected .*, got one for 60, 70; install CUDA"):
        toolchain.choose_architectures("", {"60", "70"})


def test_the_host_compiler_is_that_of_cxx(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ccache").touch(mode=0o755)
    on_path = {"PATH": str(tmp_path / "bin")}
    assert toolchain.host_compiler({"CXX": "ccache g++ -m64", **on_path}) == ["ccache", "g++", "-m64"]
    with pytest.raises(toolchain.BuildError, match=r"`CXX` expected a C\+\+17 compiler, got clang\+\+, which is not"):
        toolchain.host_compiler({"CXX": "clang++", **on_path})
    with pytest.raises(
        toolchain.BuildError, match=r"`CXX` expected a C\+\+17 compiler, got none on PATH; install g\+\+"
    ):
        toolchain.host_compiler({"PATH": str(tmp_path)})


def test_a_compiler_without_openmp_or_x86_builds_baseline_on_one_thread(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"  # refuses every flag of the probes, as a compiler for another processor would
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*|*-mavx*) exit 1 ;; esac\n')
    compiler.chmod(0o755)
    assert toolchain.openmp_flags([str(compiler)]) == ()
    assert toolchain.cpu_variants([str(compiler)]) == ["baseline"]


def test_a_compiler_with_simd_pragmas_only_gets_those(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *"-fopenmp "*) exit 1 ;; esac\n')
    compiler.chmod(0o755)
    assert toolchain.openmp_flags([str(compiler)]) == ("-fopenmp-simd",)


def test_the_linker_sees_baseline_first() -> None:
    # It keeps the first copy of an inline function: the copy must be one that every processor runs.
    assert list(toolchain.ISA_FLAGS) == ["baseline", "avx2", "avx512"]
    assert toolchain.ISA_FLAGS["baseline"] == ()
