"""The papers' tables: order of the cells, resuming, merging, what is printed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bdfast
from bdfast.attacks.presets import preset
from bdfast.defenses import AdvrBDConfig
from benchmarks import reproduce
from benchmarks.reproduce import Cell
from benchmarks.reproduction.protocols import TABLES, Outcome, Scale
from benchmarks.scenario import Victim

Run = Callable[..., int]


@pytest.fixture
def calls() -> list[tuple[str, int]]:
    """Which victims a method was given."""
    return []


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[tuple[str, int]]) -> Run:
    """The script, with two methods that do nothing, on 60 digits."""

    def nothing(victim: Victim, scale: Scale) -> Outcome:
        calls.append((victim.scenario.attack, victim.scenario.seed))
        return {"d3": victim.model}

    def twice(victim: Victim, scale: Scale) -> Outcome:
        return {"ft": victim.model, "ft-sam": victim.model}

    small = bdfast.data.load("digits", limit=(60, 40))
    monkeypatch.setitem(TABLES, "d3", replace(TABLES["d3"], methods={"d3": nothing, "both": twice}))
    monkeypatch.setattr(bdfast.data, "load", lambda name: small)
    monkeypatch.setattr(reproduce, "VICTIMS", tmp_path / "victims")

    def main(*arguments: str) -> int:
        fixed = ["--table", "d3", "--data", "digits", "--device", "cpu", "--victim-epochs", "1"]
        return reproduce.main([*fixed, "--attacks", "badnets", "wanet", *arguments])

    return main


def records(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["records"]
    return found


def test_a_table_goes_on_where_it_stopped(run: Run, tmp_path: Path, calls: list[tuple[str, int]]) -> None:
    path = tmp_path / "r.json"
    assert run("--output", str(path), "--budget-minutes", "0") == 1
    assert (calls, records(path)) == ([], [])
    assert run("--output", str(path)) == 0
    assert calls == [("badnets", 0), ("wanet", 0)]
    assert [(r["attack"], r["row"]) for r in records(path)][:3] == [("badnets", row) for row in ("d3", "ft", "ft-sam")]
    assert run("--output", str(path), "--seeds", "0", "1") == 0
    assert calls[2:] == [("badnets", 1), ("wanet", 1)]
    text = path.with_suffix(".md").read_text()
    assert "| 10 % | badnets | d3 | 90.77/0.74/96.87 |" in text
    assert text.count("| 2 |") == 8  # two seeds of two attacks: the victim and three rows


def test_results_of_several_runs_become_one_table(run: Run, tmp_path: Path, calls: list[tuple[str, int]]) -> None:
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    for seed, part in enumerate(parts):
        run("--output", str(part), "--seeds", str(seed))
    merged = tmp_path / "all.json"
    before = len(calls)
    assert run("--output", str(merged), "--merge", *map(str, parts), "--seeds", "0", "1") == 0
    assert len(calls) == before
    assert len(records(merged)) == 12
    with pytest.raises(SystemExit, match=r"`.*a.json` expected a result of .*'epochs': 7"):
        run("--output", str(tmp_path / "other.json"), "--merge", str(parts[0]), "--epochs", "7")


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_hold_what_was_published(table: Any) -> None:
    """Every published attack and row can be made, and ASR and ACC are percentages."""
    for rate, by_attack in table.published.items():
        assert rate in table.rates
        for attack, rows in by_attack.items():
            assert attack in table.attacks
            assert "rate" in preset(table.setting, attack)
            assert all(0 <= value <= 100 for figures in rows.values() for value in figures)


def test_all_attacks_of_a_seed_come_before_the_next_seed() -> None:
    cells = list(reproduce.cells(TABLES["pad-ft"], ("badnets", "wanet"), (0, 1), (0.1,)))
    assert cells[0] == Cell(0.1, "badnets", 0, "pad-ft")
    seeds = [cell.seed for cell in cells]
    assert seeds == sorted(seeds)


def test_advrbd_makes_both_rows_of_either_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = bdfast.data.load("digits", limit=(200, 40))
    monkeypatch.setattr(bdfast.data, "load", lambda name: small)
    monkeypatch.setattr(reproduce, "VICTIMS", tmp_path / "victims")
    short = dict.fromkeys(("warm_up_epochs", "content_epochs", "enhance_epochs", "relabel_epochs", "patches"), 1)
    options = {**short, "content_networks": 2, "rounds": 2, "steps": 1, "augment": "crop"}
    make = classmethod(lambda cls, **changes: cls(**{**options, **changes}))
    monkeypatch.setattr(AdvrBDConfig, "for_digits", make)
    path = tmp_path / "advrbd.json"
    words = ["--table", "advrbd", "--data", "digits", "--device", "cpu", "--attacks", "badnets", "--epochs", "1"]
    assert reproduce.main([*words, "--victim-epochs", "1", "--output", str(path)]) == 0
    rows = [record["row"] for record in records(path)]
    assert set(rows) <= {f"advrbd{r}{p}" for r in ("", "+relabel") for p in ("", " (robust)")}
    assert {"advrbd", "advrbd (robust)"} <= set(rows)
    assert "| 5 % | badnets | advrbd | 85.72/0.00 |" in path.with_suffix(".md").read_text()


def test_gic_is_handed_over_with_the_same_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[list[str]] = []

    def instead(words: list[str]) -> int:
        given.append(words)
        return 1

    monkeypatch.setattr(reproduce.gic_families, "main", instead)
    words = ["--table", "gic", "--data", "digits", "--device", "cpu", "--attacks", "blended", "--seeds", "3", "4"]
    assert reproduce.main([*words, "--budget-minutes", "9", "--output", str(tmp_path)]) == 1
    options = reproduce.gic_families._parser().parse_args(given[0])
    assert (options.data, options.attack, options.rate, options.ratio) == ("digits", "blended", 0.1, 0.1)
    assert (options.seeds, options.budget_minutes, options.output) == ([3, 4], 9.0, tmp_path)
    monkeypatch.setenv("BDFAST_DATA", "")  # restored at the end
    words = ["--table", "gic", "--data", "there.npz", "--device", "cuda"]
    assert reproduce.main(words) == 1
    options = reproduce.gic_families._parser().parse_args(given[1])
    assert (options.data, options.precision, options.ratio, options.seeds) == ("cifar10", "bf16", 0.05, [0])
    assert os.environ["BDFAST_DATA"] == "there.npz"
    with pytest.raises(SystemExit, match="expected one attack, one rate and no --merge, got 2, 1 and 0"):
        reproduce.main(["--table", "gic", "--attacks", "badnets", "wanet"])
