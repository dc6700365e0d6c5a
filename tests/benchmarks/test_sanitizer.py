"""compute-sanitizer's part of the GPU check, with a script in its place."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
import torch

from benchmarks.checks import sanitizer
from benchmarks.stage import Context, Result, SkipStage

OURS = """\
========= Invalid __global__ write of size 4 bytes
=========     at void bdfast::step_kernel<float>(float *)+0x1f0
=========     by thread (31,0,0) in block (0,0,0)
=========     Address 0x7f0000000204 is out of bounds
"""
TORCHS = """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4>(int)+0x1f0
=========     by thread (0,0,0) in block (0,0,0)
"""
HAZARD = """\
========= Error: Race reported between Write access at rows_kernel+0x10 in rows.py:20
=========     and Read access at rows_kernel+0x20 in rows.py:21 [16 hazards]
=========     at rows_kernel+0x10
"""
END = f"case sce_loss rows triton\n{sanitizer.DONE}\n"


def script(folder: Path, body: str) -> str:
    """A compute-sanitizer of this body; the tool's name is its second argument."""
    path = folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def context(seconds: float = 30.0, device: str = "cuda") -> tuple[Context, list[Result]]:
    saved: list[Result] = []
    return Context(torch.device(device), True, None, time.monotonic() + seconds, saved.append), saved


def test_errors_of_one_tool_fail_the_stage_and_those_of_pytorch_do_not(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text(f"{END}{OURS}{OURS}========= ERROR SUMMARY: 2 errors\n")
    (tmp_path / "torch").write_text(f"{END}{TORCHS}========= ERROR SUMMARY: 1 error\n")
    (tmp_path / "race").write_text(f"{END}{HAZARD}========= RACECHECK SUMMARY: 1 hazard displayed (1 error)\n")
    (tmp_path / "good").write_text(f"{END}========= ERROR SUMMARY: 0 errors\n")
    names = "memcheck) f=bad;; initcheck) f=torch;; racecheck) f=race;; *) f=good;;"
    program = script(tmp_path, f'case "$2" in {names} esac; cat "{tmp_path}/$f"')
    where, saved = context()
    result = sanitizer.watch(program, where)
    assert [(line["tool"], line["errors"], line["in torch"]) for line in result["lines"]] == [
        ("memcheck", 2, 0), ("racecheck", 1, 0), ("initcheck", 0, 1), ("synccheck", 0, 0),
    ]  # fmt: skip
    assert {line["ended"] for line in result["lines"]} == {"finished"}
    assert [failure.partition(":")[0] for failure in result["failures"]] == ["memcheck", "racecheck"]
    assert "Invalid __global__ write of size 4 bytes at void bdfast::step_kernel" in result["failures"][0]
    assert len(saved) == 4
    header, lines = sanitizer.table(result)
    assert all(len(line) == len(header) for line in lines)


def test_it_ends_in_time_with_the_cases_seen(tmp_path: Path) -> None:
    where, _ = context(2.5)
    began = time.monotonic()
    result = sanitizer.watch(script(tmp_path, "echo case one; exec sleep 60"), where)
    assert time.monotonic() - began < 10
    assert {(line["ended"], line["cases"]) for line in result["lines"]} == {("out of time", 1)}
    assert result["failures"] == []


def test_a_process_that_stops_early_and_errors_of_another_form_are_failures() -> None:
    _, failures = sanitizer.verdict("memcheck", "case one\nTraceback\n========= ERROR SUMMARY: 0 errors\n")
    assert failures == ["memcheck: ended before every case ran: ========= ERROR SUMMARY: 0 errors"]
    _, failures = sanitizer.verdict("synccheck", f"{END}========= ERROR SUMMARY: 3 errors\n")
    assert failures == ["synccheck: 3 errors in its summary, of a form unknown here"]


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer.toolchain, "find_nvcc", lambda: str(tmp_path / "nvcc"))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    assert sanitizer.find_sanitizer() is None
    with pytest.raises(SkipStage, match="no compute-sanitizer beside nvcc or on PATH"):
        sanitizer.run(context()[0])
    assert sanitizer.find_sanitizer() is None
    program = script(tmp_path, "true")
    assert sanitizer.find_sanitizer() == program
    with pytest.raises(SkipStage, match="--device cpu: compute-sanitizer watches CUDA kernels"):
        sanitizer.run(context(device="cpu")[0])


def test_the_cases_that_it_watches_run(capsys: pytest.CaptureFixture[str]) -> None:
    sanitizer.child(torch.device("cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == sanitizer.DONE
    watched = {line.split()[1] for line in lines[:-1]}
    assert watched == {suite.name for suite, _, _ in sanitizer.cases(torch.device("cpu"))}
    assert "projected_sgd_step_" in watched
