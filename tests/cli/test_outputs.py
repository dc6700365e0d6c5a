"""Tables, CSV, JSON and the folder that appears as a whole."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import pytest

from bdfast.cli.outputs import epoch_rows, record_rows, results_folder, table, to_json, write_csv
from bdfast.metrics import Metrics
from tests.cli.conftest import names


def test_table_by_hand() -> None:
    before, after = Metrics(acc=0.9, asr=1.0, ra=0.0), Metrics(acc=0.8, asr=0.25, ra=0.5)
    lines = table({"before": before, "d3": after}).splitlines()
    assert lines[0].split() == ["ACC", "ASR", "RA", "DER"]
    assert lines[1].split() == ["before", "90.0", "100.0", "0.0", "-"]
    assert lines[2].split() == ["d3", "80.0", "25.0", "50.0", "82.5"]  # (0.75 - 0.1 + 1) / 2
    assert len({len(line) for line in lines}) == 1


def test_table_of_one_model_has_no_rating() -> None:
    assert table({"victim": Metrics(acc=1.0, asr=math.nan)}).split() == [
        "ACC",
        "ASR",
        "RA",
        "victim",
        "100.0",
        "-",
        "-",
    ]


def test_table_of_an_attack_on_one_class_shows_the_others() -> None:
    rows = {"victim": Metrics(acc=0.9, asr=1.0, asr_others=0.25), "d3": Metrics(acc=0.9, asr=0.5)}
    header, victim, defended = (line.split() for line in table(rows).splitlines())
    assert header == ["ACC", "ASR", "RA", "ASR-others", "DER"]
    assert (victim, defended) == (
        ["victim", "90.0", "100.0", "-", "25.0", "-"],
        ["d3", "90.0", "50.0", "-", "-", "75.0"],
    )


def test_json_has_no_nan() -> None:
    assert json.loads(to_json({"a": math.nan, "b": [math.inf, Path("x")]})) == {"a": None, "b": [None, "x"]}


def test_csv(tmp_path: Path) -> None:
    history = [
        {"epoch": 1, "loss": 0.5, "accuracy": 0.75, "lr": 0.1, "distance": {"a": 1.0, "b": 2.0}, "norm": {"a": 9.0}}
    ]
    write_csv(tmp_path / "r.csv", epoch_rows(history, Metrics(0.9, 1.0, 0.0), Metrics(0.8, math.nan, 0.5)))
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["", "epoch", "test_acc", "test_asr", "test_ra", "train_loss", "train_acc", "lr", "distance"]
    assert rows[1] == ["0", "0", "0.9", "1.0", "0.0", *["nan_value"] * 4]
    assert rows[2] == ["1", "1", "0.8", "nan_value", "0.5", "0.5", "0.75", "0.1", "3.0"]


def test_rows_of_a_record_are_one_an_epoch() -> None:
    history = [{"epoch": e, "loss": 0.5, "accuracy": 0.75, "lr": 0.1} for e in (1, 2)]
    assert record_rows(history, Metrics(0.8, math.nan, 0.5)) == [
        {"epoch": 0, "train_loss": 0.5, "train_acc": 0.75, "lr": 0.1},
        {"epoch": 1, "train_loss": 0.5, "train_acc": 0.75, "lr": 0.1, "test_acc": 0.8, "test_ra": 0.5},
    ]


def test_folder_appears_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with results_folder("test", out) as folder:
        (folder / "one").write_text("1")
        assert "one" not in names(out)
    assert names(out) == ["one"]


def write_and_fail(out: Path) -> None:
    with results_folder("test", out) as folder:
        (folder / "one").write_text("new")
        raise RuntimeError


def test_folder_vanishes_if_the_block_raises(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "one").write_text("old")
    for out in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(RuntimeError):
            write_and_fail(out)
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old" / "one").read_text() == "old"


def test_interrupt_names_what_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="no result was written"), results_folder("test", tmp_path / "out"):
        raise KeyboardInterrupt


@pytest.mark.skipif(os.name != "posix", reason="file locks")
def test_what_a_killed_run_left_goes_and_what_another_run_holds_stays(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-killed").mkdir()
    (tmp_path / ".unfinished-killed" / "half").write_text("1")
    with results_folder("test", tmp_path) as held, results_folder("test", tmp_path) as other:
        assert names(tmp_path) == sorted([held.name, other.name])
        (held / "one").write_text("1")
    assert names(tmp_path) == ["one"]
