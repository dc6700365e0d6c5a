"""The experiment on families of auxiliary data, so small that it shows no more than that it runs and goes on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import calibrate, gic_families
from benchmarks.gic_tables import WITH, WITHOUT, grid, summary, table, verdict


def line(seed: int, family: str, purifier: str, data: str, der: float) -> dict[str, Any]:
    rates = {"acc": 90.0, "asr": 5.0, "ra": 80.0}
    head = {"seed": seed, "family": family, "purifier": purifier, "data": data}
    return {**head, "before": rates, "after": rates, "der": der, "seconds": 1.0}


def test_it_runs_stops_goes_on_and_writes_tables(tmp_path: Path) -> None:
    words = ["--seeds", "0", "--families", "noise", "--purifiers", "ft", "--victim-epochs", "1", "--epochs", "1"]
    words += ["--steps", "2", "--ratio", "0.05", "--output", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        assert gic_families.main([*words, "--budget-minutes", "0"]) == 1
        assert gic_families.main(words) == 0
        first = json.loads((tmp_path / "digits.json").read_text())
        assert gic_families.main(words) == 0
    finally:
        torch.set_num_threads(threads)
    again = json.loads((tmp_path / "digits.json").read_text())
    assert again["records"] == first["records"]
    assert [r["data"] for r in again["records"]] == [WITHOUT, WITH]
    assert [c["family"] for c in again["calibrations"]] == ["noise"]
    assert again["complete"]
    with (tmp_path / "digits.csv").open(newline="") as file:
        assert [row["data"] for row in csv.DictReader(file)] == [WITHOUT, WITH]
    assert "| noise | ft |" in (tmp_path / "digits.md").read_text()
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="is of other settings"):
        gic_families.main([*words, "--delta", "0.1"])


def test_summary_counts_pairs_that_are_complete() -> None:
    records = [
        line(0, "blur", "ft", WITHOUT, 50.0),
        line(0, "blur", "ft", WITH, 60.0),
        line(1, "blur", "ft", WITHOUT, 70.0),
        line(1, "blur", "ft", WITH, 66.0),
        line(1, "blur", "d3", WITHOUT, 90.0),
    ]
    found = summary(records)
    assert list(found) == ["ft", "all"]
    assert found["ft"] == {"pairs": 2, "without": 60.0, "with": 63.0, "better": 1, "worse": 1, "spread": 9.9}
    assert verdict(found).startswith("ft: mean DER 60.00 without, 63.00 with GIC (+3.00; better in 1")
    assert grid(records) == {"blur": {"ft": (60.0, 63.0), "d3": (90.0, None)}}
    _, lines = table(records)
    assert [row[-1] for row in lines] == ["+3.0", "-"]


def test_calibration_in_float32_ends_where_the_plain_loop_does() -> None:
    result = calibrate.measure(torch.device("cpu"), 4, 4, 2, 1, network="digits_cnn")
    assert result["difference"]["fp32"]["pixels"] < 0.01
    assert set(result["times"]["fp32"]) == {"plain", "common"}
