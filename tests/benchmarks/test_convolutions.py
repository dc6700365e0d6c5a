"""The benchmark of convolutions: what it prints, writes and puts into the documentation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdfast.runtime import winograd
from benchmarks import convolutions, environment, report

SMALL = ["--images", "2", "--rounds", "1", "--layers", "16x8", "--networks", "resnet18", "--threads", "1"]


@pytest.mark.skipif(not winograd.available(), reason="needs fused multiply-adds")
def test_layers_and_networks_beside_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "RESULTS", tmp_path)
    assert convolutions.main([*SMALL, "--save"]) == 0
    shown = capsys.readouterr().out
    assert "16 channels, 8x8" in shown
    assert "training step" in shown
    result = json.loads((tmp_path / "convolutions_cpu.json").read_text())
    assert [r["pass"] for r in result["layers"]] == list(convolutions.PASSES)
    assert all(r["off"]["bdfast"] < 3e-6 for r in result["layers"])
    text = report.cpu_convolutions(report.newest(tmp_path))
    assert "| 16 channels, 8x8 | forward |" in text
    assert "Batches of 2 images" in text
    assert winograd.available()  # left on


def test_a_machine_without_the_kernel_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(winograd, "_ENABLED", False)
    assert convolutions.main(SMALL) == 2
    assert "no such kernel" in capsys.readouterr().err
    assert report.cpu_convolutions({}) == report.NOT_MEASURED
