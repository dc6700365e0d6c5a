"""Tables and plot from result files, and how stale ones are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bdfast.attacks import KLScoreConfig
from bdfast.data.source import Source
from benchmarks import digits_defenses, pictures, report, score_advrbd
from tools import kernel_table

FACTS: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789",
    "command": "benchmarks/compare.py",
    "machine": {"cpu": "a processor", "cores": 2, "threads": 2, "load": 0.1, "system": "Linux"},
    "gpu": None,
    "versions": {"torch": "2.13.0"},
}
FIGURES = {"bytes": 100, "us": 12.5, "ratios": {"usual": 8.0, "eager": 3.25}, "gb_per_s": 0.5, "share_of_copy": 0.25}
RECORD = {"op": "an_op", "case": "a-case", "dtype": "float32", **FIGURES, "rows": {}}


def cpu_result(**changes: Any) -> dict[str, Any]:
    heaps = {"default": [RECORD, {**RECORD, "dtype": "float16", "us": 99.0}], "kept": [{**RECORD, "us": 11.0}]}
    return {"kind": "cpu", "complete": True, "environment": FACTS, "heaps": heaps, **changes}


def gpu_result() -> dict[str, Any]:
    modes = {mode: {**FIGURES, "rows": {}} for mode in ("plain", "graph", "wall")}
    line = {"op": "an_op", "case": "a-case", "dtype": "float32", "backend": "cuda", "bytes": 100, "modes": modes}
    ops = {"records": [{**line, "no_graph": {}, "activity": {"bdfast": {"kernels": 2.0, "copies": 0.0, "syncs": 0.0}}}]}
    end = {
        "records": [{**digits_record("d3", 0, 1.0), "timings": {"setup": 0.5, "train": 2.5}}],
        "step": {"ft_ms": 10.0, "d3_ms": 10.1, "ratio": 1.0101},
    }
    stages = {"ops": {"status": "passed", "result": ops}, "d3": {"status": "passed", "result": end}}
    gpu = {"name": "NVIDIA H200", "driver": "580"}
    return {"kind": "gpu", "complete": True, "environment": {**FACTS, "gpu": gpu}, "stages": stages}


def digits_record(defense: str, seed: int, asr: float) -> dict[str, Any]:
    return {
        "data": "digits", "attack": "badnets", "seed": seed, "defense": defense, "reserve": 140, "der": 97.5,
        "before": {"acc": 99.0, "asr": 100.0, "ra": 0.0}, "after": {"acc": 98.0, "asr": asr, "ra": 80.0},
        "seconds": 3.0, "victim_seconds": 9.0,
    }  # fmt: skip


def put(folder: Path, **results: dict[str, Any]) -> Path:
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return folder


def block(name: str, text: str = "old\n") -> str:
    return f"<!-- begin:{name} -->\n{text}<!-- end:{name} -->\n"


def test_tables_are_written_and_then_fresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [digits_record("d3", 0, 1.0), digits_record("d3", 1, 4.0), digits_record("ft", 0, 90.0)]
    digits = {"kind": "digits", "complete": True, "environment": FACTS, "records": records}
    put(tmp_path, cpu=cpu_result(), gpu=gpu_result(), digits=digits)
    readme = tmp_path / "README.md"
    names = ["cpu-ops", "gpu-ops", "gpu-defenses", "gpu-throughput", "cifar10", "digits", "predictions"]
    readme.write_text("before\n" + "middle\n".join(map(block, names)) + block("of-others") + "after\n")
    arguments = ["--results", str(tmp_path), str(readme)]
    assert report.main(["--check", *arguments]) == 1
    assert block("digits") in readme.read_text()
    assert report.main(arguments) == 0
    assert report.main(["--check", *arguments]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(block("of-others") + "after\n")
    assert text.count("middle") == 6
    assert "| an_op | a-case | 0.0001 | 2 | 12.5 | 25 % |" in text
    assert "| an_op | a-case | float32 | 12.5 | 8 | 3.25 | - | 0.5 | 25 % |" in text
    assert "| an_op | a-case | float32 | 11 |" in text
    assert "float16" not in text
    assert "| an_op | a-case | float32 | cuda | 12.5 | 3.25 | - | 12.5 | 3.25 | - | 12.5 | 0.5 | 25 % | 2 | 0 |" in text
    assert "| 10.1 | 1.010 |" in text[text.index("begin:gpu-defenses") : text.index("end:gpu-defenses")]
    assert block("gpu-throughput", f"{report.NOT_MEASURED}\n") in text
    assert "| D3 | 99.0 / 100.0 | 98.0 / 1.0 | 3 |" in text
    assert {path.name for path in tmp_path.glob("*.png")} == set(pictures.PICTURES)
    assert "| badnets | 140 | d3 | 2 |" in text
    assert "2.5 (1.0-4.0)" in text
    assert "commit 0123456789, 2026-01-02; `benchmarks/compare.py`; `benchmarks/results/cpu.json`" in text
    assert "NVIDIA H200, driver 580" in text
    capsys.readouterr()


def test_a_new_result_makes_pictures_and_tables_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, cpu=cpu_result())
    readme, plots = tmp_path / "README.md", [tmp_path / "speed.png", tmp_path / "roofline_cpu.png"]
    readme.write_text(block("cpu-ops"))
    arguments = ["--results", str(tmp_path), str(readme)]
    report.main(arguments)
    faster = {**RECORD, "ratios": {"eager": 4.0}, "gb_per_s": 0.6}
    later = cpu_result(
        environment={**FACTS, "date": "2026-02-01T00:00:00+00:00"}, heaps={"default": [faster], "kept": [faster]}
    )
    put(tmp_path, later=later)
    capsys.readouterr()
    assert report.main(["--check", *arguments]) == 1
    assert capsys.readouterr().out.splitlines() == [f"stale {path}" for path in (readme, *plots)]


def test_a_picture_with_nothing_to_show_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--results", str(put(tmp_path, cpu=cpu_result())), str(tmp_path / "cpu.md")]
    (tmp_path / "cpu.md").write_text("")
    report.main(arguments)
    (tmp_path / "cpu.json").unlink()
    assert report.main(["--check", *arguments]) == 1
    assert report.main(arguments) == 0
    assert list(tmp_path.glob("*.png")) == []
    assert report.main(["--check", *arguments]) == 0
    capsys.readouterr()


def test_rooflines_hold_a_copy_of_the_same_run() -> None:
    shown = pictures.cpu_roofline({"cpu": cpu_result()})
    assert shown["ops"] == {"an_op": {"a-case": [100, 0.5, 2.0]}}
    shown = pictures.gpu_roofline({"gpu": gpu_result()})
    assert (shown["where"], shown["ops"]) == ("NVIDIA H200", {"an_op": {"a-case": [100, 0.5, 2.0]}})


def test_where_the_time_goes_is_what_the_stages_said() -> None:
    result = gpu_result()
    result["stages"] |= {
        "pad_ft": {"result": {"records": [{"defense": "paper", "timings": {"score": 1.0, "tune": 0.0}}]}},
        "gic": {"result": {"calibration": {"timings": {"calibrate": 0.9}}}},
        "advrbd": {"status": "out of time", "result": {"images": 10_000, "stages": {"warm_up": 3.0}}},
    }
    assert pictures.stage_times({"gpu": result})["bars"] == {
        "D3": {"setup": 0.5, "train": 2.5}, "PAD-FT, paper": {"score": 1.0}, "GIC, calibration": {"calibrate": 0.9},
    }  # fmt: skip
    assert pictures.stage_times({}) == {}


def test_kernels_are_those_of_one_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_table, "TABLE", tmp_path / "kernel_table.json")
    assert report.kernels({}) == "*Not compiled yet.*"
    profile = {
        "registers": 32, "stack": 0, "shared": 0, "instructions": 100, "loads": {"16": 4}, "stores": {"16": 2},
        "kinds": {"float": 8},
    }  # fmt: skip
    kept = {"versions": {"nvcc": "13.0"}, "kernels": {"cuda step": {"80": {**profile, "registers": 40}, "90": profile}}}
    kernel_table.TABLE.write_text(json.dumps(kept))
    text = report.kernels({})
    assert "| `cuda step` | 90 | 32 | 0 | 100 | 4 x 16 B | 2 x 16 B | 8 | 0 | 0 | 0 |" in text
    assert "| 80 |" not in text
    assert "nvcc 13.0" in text


def test_parts_of_the_cases_and_older_results_do_not_count(tmp_path: Path) -> None:
    newer = {**FACTS, "date": "2027-01-01T00:00:00+00:00"}
    older = {**FACTS, "date": "2025-01-01T00:00:00+00:00"}
    put(tmp_path, a=cpu_result(), b=cpu_result(environment=newer, complete=False), c=cpu_result(environment=older))
    assert report.newest(tmp_path)["cpu"]["file"] == "a.json"


def test_wrong_ops_show_in_the_table() -> None:
    failed = {"op": "an_op", "case": "a-case", "dtype": "float32", "failures": ["off"]}
    text = report.cpu_ops({"cpu": {**cpu_result(heaps={"default": [failed]}), "file": "x.json"}})
    assert "| an_op | a-case | float32 | - | - | - | - | - | wrong |" in text


def test_scores_are_taken_when_every_slice_was_timed(tmp_path: Path) -> None:
    images = torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
    source = Source("scores", (images, torch.arange(9) % 3))
    options: dict[str, Any] = {"images": 9, "batch": 4}
    partly = score_advrbd.measure(network, source, KLScoreConfig(steps=1), **options, deadline=0.0)
    assert not score_advrbd.for_file(partly, 9, "a network", FACTS)["complete"]
    whole = score_advrbd.for_file(
        score_advrbd.measure(network, source, KLScoreConfig(steps=1), **options), 9, "a network", FACTS
    )
    assert (whole["complete"], whole["samples"], whole["slices"]) == (True, 8, 2)
    text = report.fill(block("score-advrbd"), report.newest(put(tmp_path, score_advrbd=whole)))
    assert "| engine bf16, as found |" in text
    assert "a network; 8 samples, medians of 2 slices; a processor, 2 threads" in text


def test_a_marker_without_an_end_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- begin:digits -->\n")
    assert report.main(["--results", str(tmp_path), str(readme)]) == 2
    assert "expected its `end`" in capsys.readouterr().err


def test_digits_go_on_where_they_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "digits.json"
    small = ["--attacks", "badnets", "--seeds", "0", "--victim-epochs", "1", "--epochs", "1", "--output", str(path)]
    assert digits_defenses.main([*small, "--reserves", "90", "120", "--budget-minutes", "0"]) == 1
    assert "the same command goes on" in capsys.readouterr().out
    assert digits_defenses.main([*small, "--reserves", "90", "120"]) == 0
    result = json.loads(path.read_text())
    assert [(r["defense"], r["reserve"]) for r in result["records"]] == [
        (d, n) for n in (90, 120) for d in ("ft", "d3")
    ]
    assert result["complete"]
    assert all(0 <= r["after"]["acc"] <= 100 and 0 <= r["der"] <= 100 for r in result["records"])
    seconds = result["records"][0]["seconds"]
    assert digits_defenses.main([*small, "--reserves", "90", "120"]) == 0
    assert json.loads(path.read_text())["records"][0]["seconds"] == seconds
    with pytest.raises(SystemExit, match="pass --output"):
        digits_defenses.main([*small, "--reserves", "90"])
    capsys.readouterr()
