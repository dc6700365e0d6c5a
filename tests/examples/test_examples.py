"""The examples run, and print what they promise."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)  # the examples set it


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    return capsys.readouterr().out


def percentages(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", line)]


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("quickstart.py", capsys).splitlines()
    assert lines[0].split() == ["ACC", "ASR", "RA"]
    before, after = percentages(lines[1]), percentages(lines[2])
    assert before[1] > 95  # the backdoor works, ...
    assert after[1] < 10  # ... and is gone, ...
    assert after[0] > before[0] - 4  # ... at little cost
    assert percentages(lines[3])[0] > 90


def test_own_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("own_checkpoint.py", capsys).splitlines()
    assert lines[0] == "metadata of the checkpoint: {'epoch': 8}"
    assert lines[1].startswith("layers moved: classifier; distance ")
    before, after = percentages(lines[2])
    assert before > 75
    assert after > 75


def test_op_in_training_loop(capsys: pytest.CaptureFixture[str]) -> None:
    out = run("op_in_training_loop.py", capsys)
    assert "hinge_cross_entropy: requested 'auto'" in out
    distances = [float(number) for number in re.findall(r"weights (\S+) from the reference", out)]
    assert len(distances) >= 1
    assert max(distances) < 1e-4


def test_new_op() -> None:
    """In a process of its own: its op would stay among those of this one."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / "new_op.py")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "reference 7 checks against float64, 0 mismatches" in done.stdout
    assert done.stdout.count(", 0 mismatches") + done.stdout.count("left out: ") == 2  # Triton's, if it runs
    assert done.stdout.count("schema, fake kernel and dispatch agree") == 2
    assert "gradcheck True" in done.stdout


def test_suspicious_record(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="activation bounds are kept under `bdfast`"):
        lines = run("suspicious_record.py", capsys).splitlines()
    assert lines[0] == "digits_cnn: 140 of 1400 images poisoned"
    before, after = percentages(lines[1]), percentages(lines[2])
    assert before[1] > 95
    assert after[1] < 20
    assert after[0] > before[0] - 8
    assert lines[3:] == ["left in record/badnet_0_1/defense/pad_ft", "refused: code"]
