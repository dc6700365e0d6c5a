"""``bdfast demo``, two epochs of each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome, names

Run = Callable[..., Outcome]


def test_demo(bdfast: Run, tmp_path: Path) -> None:
    outcome = bdfast("demo", "--quick", "--out", tmp_path / "demo")
    assert outcome.code == 0
    assert [line.split()[0] for line in outcome.out.splitlines()[2:6]] == ["ACC", "before", "ft", "d3"]
    assert names(tmp_path / "demo") == ["demo.json", "demo.png"]
    content = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert set(content["ratings"]) == {"ft", "d3"}
    assert content["rates"]["before"]["n_clean"] == 397
    assert len(content["history"]) == 2


def test_without_matplotlib(bdfast: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = bdfast("demo", "--quick", "--out", tmp_path / "demo")
    assert outcome.code == 0
    assert "no picture" in outcome.err
    assert names(tmp_path / "demo") == ["demo.json"]


def test_without_scikit_learn(bdfast: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    outcome = bdfast("demo", "--quick", "--out", tmp_path / "demo")
    assert outcome.code == 2
    assert "pip install 'bdfast[data]'" in outcome.err
    assert not (tmp_path / "demo").exists()
