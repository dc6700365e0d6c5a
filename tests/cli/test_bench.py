"""``bdfast bench``: what it times, what it writes, what it says of an op that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdfast.cli.program import main
from bdfast.testing import rows


def test_a_case_is_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert (
        main(["bench", "hinge", "--case", "d3-cifar10", "--seconds", "0.05", "--device", "cpu", "--out", str(out)]) == 0
    )
    header, line = capsys.readouterr().out.splitlines()[:2]
    assert header.split()[:4] == ["op", "case", "dtype", "us"]
    assert line.split()[:3] == ["hinge_cross_entropy", "d3-cifar10", "float32"]
    content = json.loads(out.read_text())
    (record,) = content["records"]
    assert set(record["rows"]) == {"bdfast", "eager", "copy"}
    assert record["ratios"]["eager"] > 0
    assert content["device"] == "cpu"


def test_an_op_that_is_wrong_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rows, "failures", lambda *_: ["loss differs"])
    assert main(["bench", "hinge", "--case", "d3-cifar10", "--device", "cpu"]) == 1
    assert "wrong" in capsys.readouterr().out


def test_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "softmax"]) == 2
    assert "`OP` expected words in the names of batch_norm_clipped_relu" in capsys.readouterr().err
    assert main(["bench", "--device", "nowhere"]) == 2
    assert "bdfast bench" in capsys.readouterr().err
