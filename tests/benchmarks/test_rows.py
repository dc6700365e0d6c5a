"""What is timed for a case, and that nothing wrong is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bdfast.testing import OpSuite, rows, suites
from bdfast.testing.tables import text_table
from bdfast.testing.timing import Timing, interleave
from benchmarks import compare, goals

CPU = torch.device("cpu")


def test_every_benchmarked_case_is_found_and_every_row_runs() -> None:
    found = {(suite.name, case.name) for suite, case, _ in rows.cases(large=True)}
    assert found == {(s.name, case.name) for s in suites().values() for case in s.cases if case.benchmark}
    assert {suite.name for suite, _, _ in rows.cases()} == set(suites())
    for suite in suites().values():
        case = rows.small_case(suite)
        steps, moved = rows.prepare(suite, case, CPU, case.dtypes[0], compiled=False)
        assert list(steps) == [rows.OURS, *(name for name in suite.baselines if name != "compile"), rows.COPY]
        assert moved > 0
        for step in steps.values():
            step()


def test_copy_moves_as_many_bytes() -> None:
    destination = rows.copy_step(4096, CPU)()
    assert destination.numel() * destination.element_size() == 2048  # read once, written once


def test_figures_by_hand() -> None:
    timings = {"bdfast": Timing((2e-6,)), "eager": Timing((5e-6,)), "copy": Timing((1e-6,))}
    assert rows.figures(4000, timings) == {
        "bytes": 4000,
        "us": 2.0,
        "ratios": {"eager": 2.5},
        "gb_per_s": 2.0,
        "share_of_copy": 0.5,
    }


def test_a_wrong_op_is_reported_and_has_no_timing(wrong_suite: OpSuite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "suites", lambda: {wrong_suite.name: wrong_suite})
    arguments = compare._parser().parse_args(["--case", "d3-cifar10", "--dtype", "float32", "--no-compile"])
    (chosen,) = compare.selected(arguments)
    record = compare.measure(arguments, chosen)
    assert "us" not in record
    assert "times the allowed error" in record["failures"][0]
    assert "wrong" in text_table(rows.table([record]))


def test_goals_are_judged_by_their_case_alone() -> None:
    goal = goals.Goal("op", "case", "eager", 2.0)
    records = [
        {"op": "op", "case": "case", "dtype": "bfloat16", "ratios": {"eager": 9.0}},
        {"op": "op", "case": "other", "dtype": "float32", "ratios": {"eager": 9.0}},
        {"op": "op", "case": "case", "dtype": "float32", "ratios": {"eager": 1.5}},
    ]
    assert list(goals.verdicts(records, [goal])) == [(goal, 1.5)]


def test_goals_name_cases_that_exist() -> None:
    known = {(suite.name, case.name, name) for suite, case, _ in rows.cases() for name in suite.baselines}
    assert {(goal.op, goal.case, goal.baseline) for goal in goals.CPU_GOALS} <= known


def test_heaps_differ_in_the_environment_of_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    default, kept = compare.child_environment("default"), compare.child_environment("kept")
    assert not any(name.startswith("MALLOC_") for name in default)
    assert kept["MALLOC_MMAP_THRESHOLD_"] == kept["MALLOC_TRIM_THRESHOLD_"] == str(2**40)
    assert default["OMP_WAIT_POLICY"] == kept["OMP_WAIT_POLICY"] == "passive"


def test_compare_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu.json"
    selection = ["--op", "hinge", "--case", "d3-cifar10", "--dtype", "float32", "--no-compile", "--heap", "kept"]
    assert compare.main([*selection, "--seconds", "0.01", "--min-rounds", "3", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    (record,) = result["heaps"]["kept"]
    assert record["ratios"]["eager"] > 0
    assert record["rows"]["bdfast"]["rounds"] >= 3
    assert not result["complete"]
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert "--case d3-cifar10" in result["environment"]["command"]
    assert "hinge_cross_entropy" in capsys.readouterr().out


def test_interleaved_rows_make_a_record(suite: OpSuite) -> None:
    case = next(case for case in suite.cases if case.benchmark)
    steps, moved = rows.prepare(suite, case, CPU, torch.float32, compiled=False)
    record = rows.record(suite, case, torch.float32, moved, interleave(steps, seconds=0.0, rounds=(3, 3)))
    assert record["bytes"] == suite.bytes_moved(suite.inputs(case))
    assert set(record["rows"]) == set(steps)
    assert json.loads(json.dumps(record)) == record
