"""The table of what kernels compile to: what it reads from a disassembly, and what it calls worse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tools import disassembly, kernel_table, toolchain
from tools.disassembly import Profile

SASS = """
		Function : _Z1kPf
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
                                                                 /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/                   LDG.E R5, desc[UR4][R2.64] ;  /* 0x0 */
        /*0030*/                   FFMA.FTZ R4, R4, R5, R6 ;     /* 0x0 */
        /*0040*/                   MUFU.EX2 R4, R4 ;             /* 0x0 */
        /*0050*/                   STG.E.64 desc[UR4][R2.64], R4 ;  /* 0x0 */
        /*0060*/                   EXIT ;                        /* 0x0 */
        /*0070*/                   BRA 0x70;                     /* 0x0 */
        /*0080*/                   NOP;                          /* 0x0 */
"""
USAGE = "Resource usage:\n Function _Z1kPf:\n  REG:24 STACK:0 SHARED:128 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0\n"
KERNEL = Profile(24, 0, 128, 7, {"4": 1, "16": 1}, {"8": 1}, {"float": 1, "special": 1})


def test_a_disassembly_is_read(tmp_path: Path) -> None:
    tool = tmp_path / "cuobjdump"
    (tmp_path / "usage").write_text(USAGE)
    (tmp_path / "sass").write_text(SASS)
    tool.write_text(f"#!/bin/sh\ncase $1 in -sass) cat {tmp_path}/sass;; *) cat {tmp_path}/usage;; esac\n")
    tool.chmod(0o755)
    assert disassembly.profiles(tmp_path / "k.cubin", str(tool)) == {"_Z1kPf": KERNEL}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"stack": 8}, "0 bytes of stack expected, got 8"),
        ({"loads": {"4": 5}}, "loads of 16 bytes expected, got 4"),
        ({"stores": {}}, "stores of 8 bytes expected, got 0"),
        ({"kinds": {"atomic": 1}}, "0 atomics expected, got 1"),
        ({"registers": 40}, "24 registers expected, got 40"),
        ({"instructions": 70}, "about 7 instructions expected, got 70"),
    ],
)
def test_what_is_worse(change: dict[str, object], text: str) -> None:
    worse = replace(KERNEL, **change)  # type: ignore[arg-type]
    found = kernel_table.compare({"k": {"90": worse}}, {"k": {"90": KERNEL}}, exact=True)
    assert found == [f"k (sm_90): {text}"]
    other_compiler = kernel_table.compare({"k": {"90": worse}}, {"k": {"90": KERNEL}}, exact=False)
    assert other_compiler == (found if set(change) & {"stack", "loads", "stores"} else [])


def test_the_same_or_better_passes() -> None:
    better = replace(KERNEL, registers=20, instructions=5, loads={"16": 2})
    for profile in (KERNEL, better):
        assert kernel_table.compare({"k": {"90": profile}}, {"k": {"90": KERNEL, "80": KERNEL}}, exact=True) == []


def test_the_table_knows_every_kernel() -> None:
    kept = {"old": {"90": KERNEL}}
    found = kernel_table.compare({"new": {"90": KERNEL}}, kept, exact=True)
    assert [text.partition(":")[0] for text in found] == ["new (sm_90)", "old"]


def test_markdown() -> None:
    text = kernel_table.markdown({"kernels": {"k<a|b>": {"90": KERNEL.record()}}})
    assert text.splitlines()[2] == "| `k<a\\|b>` | 90 | 24 | 0 | 7 | 1 x 4 B, 1 x 16 B | 1 x 8 B | 1 | 0 | 1 | 0 |"


@pytest.mark.skipif(
    disassembly.find_cuobjdump() is None or toolchain.find_nvcc() is None, reason="needs the CUDA toolkit"
)
def test_a_real_kernel(tmp_path: Path) -> None:
    source = tmp_path / "k.cu"
    source.write_text(
        "__global__ void k(const float4* __restrict__ x, float* y) {\n"
        "  float4 v = x[threadIdx.x]; y[threadIdx.x] = v.x * v.y + v.z * v.w; }\n"
    )
    nvcc, cuobjdump = toolchain.find_nvcc(), disassembly.find_cuobjdump()
    assert nvcc is not None
    assert cuobjdump is not None
    (profile,) = disassembly.profiles(kernel_table._nvcc(nvcc, source, "90", tmp_path), cuobjdump).values()
    assert (profile.loads, profile.stores, profile.stack) == ({"16": 1}, {"4": 1}, 0)
    assert profile.kinds["float"] == 2


def test_without_a_table_there_is_nothing_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel_table, "TABLE", tmp_path / "kernel_table.json")
    assert kernel_table.main([]) == 0
    assert capsys.readouterr().out.startswith("no kernel_table.json yet: nothing to compare with")


@pytest.mark.parametrize(("triton", "code"), [("3.6.0", 1), ("3.8.0", 0)])
def test_other_compilers_are_named_and_fail_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], triton: str, code: int
) -> None:
    table = tmp_path / "kernel_table.json"
    made_with = {"nvcc": "13.0", "triton": "3.6.0"}
    table.write_text(json.dumps({"versions": made_with, "kernels": {"k": {"90": KERNEL.record()}}}))
    monkeypatch.setattr(kernel_table, "TABLE", table)
    monkeypatch.setattr(disassembly, "find_cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(kernel_table, "versions", lambda nvcc: {**made_with, "triton": triton})
    monkeypatch.setattr(kernel_table, "compile_all", lambda *_: {"k": {"90": replace(KERNEL, stack=8)}})
    assert kernel_table.main([]) == code
    printed = capsys.readouterr().out
    assert printed.startswith("k (sm_90): 0 bytes of stack expected, got 8")
    note = "was made with nvcc 13.0, triton 3.6.0, and this run with nvcc 13.0, triton 3.8.0"
    assert (note in printed) == (code == 0)
