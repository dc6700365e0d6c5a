"""The spill check, on reports as ptxas prints them, and once through nvcc where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import check_cuda_kernels as check
from tools import toolchain

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5cleanPf' for 'sm_80'
ptxas info    : Function properties for _Z5cleanPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 4096 bytes smem, 372 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6spillyPf' for 'sm_90'
ptxas info    : Function properties for _Z6spillyPf
    256 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Function properties for _Z6helperv
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
NAMES = {"_Z5cleanPf": "clean(float*)", "_Z6spillyPf": "void n::spilly<float, 2>(float*)", "_Z6helperv": "helper()"}


def test_parse_reads_registers_stack_and_spills_of_every_function() -> None:
    assert check.parse(REPORT) == [
        check.Usage("_Z5cleanPf", "sm_80", stack=0, spill=0, registers=24),
        check.Usage("_Z6spillyPf", "sm_90", stack=256, spill=84, registers=255),
        check.Usage("_Z6helperv", "sm_90", stack=8, spill=0, registers=None),
    ]


def test_findings_name_what_is_over_its_allowance() -> None:
    found = check.findings(check.parse(REPORT), NAMES, {"helper": (8, 0, "reason")})
    assert len(found) == 1
    assert found[0].startswith("spilly (sm_90): at most 0 bytes of stack and 0 of spills expected, got 256 and 84; ")


def test_an_allowance_counts_up_to_its_bytes() -> None:
    usages = check.parse(REPORT)
    enough = {"helper": (8, 0, "reason"), "spilly": (256, 84, "reason")}
    assert check.findings(usages, NAMES, enough) == []
    assert len(check.findings(usages, NAMES, {**enough, "spilly": (256, 83, "reason")})) == 1
    assert len(check.findings(usages, NAMES, {**enough, "spilly": (255, 84, "reason")})) == 1


def test_an_allowance_that_nothing_needs_is_stale() -> None:
    allowed = {"helper": (8, 0, "reason"), "spilly": (256, 84, "reason"), "clean": (16, 0, "reason")}
    assert check.findings(check.parse(REPORT), NAMES, allowed) == [
        "cuda_kernels_allowed.txt: clean needs no stack and no spills any more; remove its line"
    ]


@pytest.mark.parametrize(
    ("signature", "short"),
    [
        ("clean(float*)", "clean"),
        (
            "void bdfast::(anonymous namespace)::step<float, (bdfast::DType)1>(float*, int)",
            "step<float, (bdfast::DType)1>",
        ),
        ("void a::b<c::d>::e<f::g<h> >(i::j)", "e<f::g<h> >"),
        ("_Z5cleanPf", "_Z5cleanPf"),
    ],
)
def test_short_name_drops_namespaces_and_parameters(signature: str, short: str) -> None:
    assert check.short_name(signature) == short


def test_the_list_of_allowances_demands_a_reason() -> None:
    assert check.read_allowed("# comment\n\nkernel 64 0 local array\n") == {"kernel": (64, 0, "local array")}
    with pytest.raises(
        toolchain.BuildError, match=r"cuda_kernels_allowed\.txt:1: expected 'kernel .* got 'kernel 64 0'"
    ):
        check.read_allowed("kernel 64 0\n")


def test_the_list_in_use_can_be_read() -> None:
    for stack, spill, reason in check.read_allowed(check.ALLOWED.read_text()).values():
        assert stack + spill > 0
        assert reason


@pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not installed")
def test_a_planted_stack_frame_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "planted.cu"
    source.write_text(
        "__global__ void planted(const float* x, float* y, int k) {\n"
        "  float local[64];\n"
        "  for (int i = 0; i < 64; ++i) local[i] = x[i * k];\n"
        "  float sum = 0;\n"
        "  for (int i = 0; i < k; ++i) sum += local[(i * 7 + threadIdx.x) % 64];\n"
        "  y[threadIdx.x] = sum;\n"
        "}\n"
    )
    assert check.main(["--archs", "80", str(source)]) == 1
    assert (
        "planted (sm_80): at most 0 bytes of stack and 0 of spills expected, got 256 and 0" in capsys.readouterr().out
    )
