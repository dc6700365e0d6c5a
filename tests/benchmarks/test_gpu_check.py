"""The stages of the GPU check on the CPU, and what becomes of stages that fail, skip or run out of time."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bdfast.data import load
from bdfast.testing import OpSuite
from bdfast.testing.device_timing import WINDOW, count_activity
from bdfast.training import TrainConfig
from benchmarks import gpu_check
from benchmarks.checks import large, numerics
from benchmarks.checks import tests as tests_stage
from benchmarks.end_to_end import d3
from benchmarks.scenario import Scenario, make_victim
from benchmarks.stage import Context, Result, SkipStage
from benchmarks.stages import CHECKS, END_TO_END, LAST, stages

CPU = torch.device("cpu")


def quick(save: Callable[[Result], None] = lambda result: None, data: str | None = None) -> Context:
    return Context(CPU, True, data, time.monotonic() + 60, save)


def test_stages_are_found_by_themselves() -> None:
    modules = sorted(path.stem for path in Path(d3.__file__).parent.glob("[a-z]*.py"))
    assert list(stages())[: len(CHECKS)] == list(CHECKS)
    assert sorted(list(stages())[len(CHECKS) : -len(LAST)]) == modules
    assert list(stages())[-len(LAST) :] == list(LAST)
    assert set(END_TO_END) <= set(modules)


def test_shares_of_time_add_up_to_less_than_nine_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    groups = gpu_check.side_by_side(list(stages().values()))
    assert sum(map(gpu_check.group_seconds, groups)) <= gpu_check.TOTAL_SECONDS < 540


def test_a_stage_that_was_done_in_time_counts_though_its_process_goes_on(tmp_path: Path) -> None:
    program = "import sys, time; open(sys.argv[1], 'w').write('{\"status\": \"passed\"}'); time.sleep(60)"
    folder = tempfile.TemporaryDirectory(dir=tmp_path)
    command = [sys.executable, "-c", program, str(Path(folder.name, "report.json"))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
    assert gpu_check.finish(gpu_check.Child(stages()["ops"], process, folder), 2.0)["status"] == "passed"


def test_what_times_nothing_runs_side_by_side_where_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = list(stages().values())
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    groups = [[stage.name for stage in group] for group in gpu_check.side_by_side(chosen)]
    assert groups[:3] == [["build"], ["numerics", "compile", "large", "victim"], ["ops"]]
    assert groups[-1] == ["sanitizer", "tests"]
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert all(len(group) == 1 for group in gpu_check.side_by_side(chosen))


@pytest.mark.parametrize("name", [name for name in stages() if name not in ("build", "tests", "sanitizer")])
def test_every_stage_runs_on_small_cases(name: str) -> None:
    stage, saved = stages()[name], []
    result = stage.run(quick(saved.append))
    assert not result.get("failures")
    assert json.loads(json.dumps(result)) == result
    assert saved, "a stage that runs out of time has nothing to show"
    header, lines = stage.table(result)
    assert lines
    assert all(len(line) == len(header) for line in lines)
    for part in saved:
        stage.table(part)


def test_numerics_finds_what_is_wrong(wrong_suite: OpSuite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "suites", lambda: {wrong_suite.name: wrong_suite})
    result = numerics.run(quick())
    wrong = {line["backend"]: line["wrong"] for line in result["lines"]}
    assert wrong["cpp"] > 0
    assert wrong["reference"] == 0
    assert any("times the allowed error" in failure for failure in result["failures"])


def test_numerics_finds_reruns_that_differ(suite: OpSuite) -> None:
    assert numerics.identical(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]))
    assert not numerics.identical(torch.tensor([1.0, 0.0]), torch.tensor([1.0, float("nan")]))
    assert not numerics.identical(torch.tensor([1.0]), torch.tensor([1.0]).nextafter(torch.tensor([2.0])))


def test_copies_keep_gaps_between_rows() -> None:
    padded = torch.arange(12.0).view(3, 4)[:, :2]
    (copy,) = numerics.copied([padded])
    assert copy.stride() == (4, 1)
    assert torch.equal(copy, padded)
    assert copy.data_ptr() != padded.data_ptr()


def test_large_finds_a_chunk_in_the_wrong_place() -> None:
    expected = torch.arange(1.0, 101.0)
    assert large.relative_error(expected.clone(), expected, 10) == 0.0
    got = torch.cat((expected[:90], expected[:10]))  # as if the index had wrapped
    assert large.relative_error(got, expected, 10) > 0.9
    assert large.relative_error(torch.ones(3), torch.zeros(3), 2) == float("inf")
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    assert large.relative_error(special.clone(), special, 4) == 0.0
    assert large.relative_error(special.nan_to_num(), special, 4) == float("inf")


def test_end_to_end_says_what_data_is_missing() -> None:
    with pytest.raises(SkipStage, match="no CIFAR-10: pass --data, or set BDFAST_DATA"):
        d3.run(Context(CPU, False, None, time.monotonic() + 60, lambda result: None))


def test_report_of_pytest(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1"><testcase classname="a" name="ok"/>'
        '<testcase classname="a" name="bad"><failure/></testcase>'
        '<testcase classname="b" name="broken"><error/></testcase>'
        '<testcase classname="b" name="later"><skipped/></testcase></testsuite></testsuites>'
    )
    assert tests_stage.summary(report) == {"passed": 1, "skipped": 1, "failures": ["a::bad", "b::broken"]}


def test_syncs_are_counted_inside_the_measured_calls_alone() -> None:
    def runtime(name: str, at: float) -> dict[str, object]:
        return {"name": name, "cat": "cuda_runtime", "ts": at, "dur": 1}

    events = [
        {"name": WINDOW, "cat": "user_annotation", "ts": 10.0, "dur": 5.0},
        {"name": WINDOW, "cat": "gpu_user_annotation", "ts": 0.0, "dur": 50.0},
        *(runtime("cudaStreamSynchronize", at) for at in (9.0, 11.0, 12.0, 16.0)),
        runtime("cudaMemcpy", 13.0),
        runtime("cudaMemcpyAsync", 13.0),
        runtime("cudaLaunchKernel", 13.0),
        {"name": "kernel", "cat": "kernel", "ts": 20.0, "dur": 1},
        {"name": "Memset", "cat": "gpu_memset", "ts": 20.0, "dur": 1},
        {"ph": "M"},
    ]
    assert count_activity(events) == {"kernels": 1, "copies": 1, "syncs": 3}


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "expected an NVIDIA GPU, got none that torch sees; run it where there is one" in capsys.readouterr().err


def test_report_is_written_with_what_every_stage_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through processes of their own: one stage skips, one passes; the file is in $OUT, too."""
    out = tmp_path / "out"
    monkeypatch.setenv("OUT", str(out))
    path = tmp_path / "gpu.json"
    assert gpu_check.main(["--device", "cpu", "--quick", "--only", "build", "large", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert json.loads((out / "gpu.json").read_text()) == result
    assert result["stages"]["build"]["status"] == "skipped"
    assert result["stages"]["large"]["status"] == "passed"
    assert result["stages"]["large"]["result"]["lines"]
    assert not result["complete"]
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("large")


def test_what_stages_found_is_kept_if_the_check_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in the second stage: the first one's report is in the file."""
    monkeypatch.delenv("OUT", raising=False)
    path, finish = tmp_path / "gpu.json", gpu_check.finish

    def interrupted(child: gpu_check.Child, limit: float) -> gpu_check.Report:
        if child.stage.name == "large":
            raise KeyboardInterrupt
        return finish(child, limit)

    monkeypatch.setattr(gpu_check, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--device", "cpu", "--quick", "--only", "build", "large", "--output", str(path)])
    assert set(json.loads(path.read_text())["stages"]) == {"build"}


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("import time; {keep}; time.sleep(60)", "out of time", "after 1 s"),
        ("{keep}; raise SystemExit(3)", "failed", "the process ended with code 3"),
    ],
)
def test_a_stage_that_does_not_end_well_keeps_what_it_found(
    program: str, status: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.dumps({"status": "running", "reason": "", "result": {"lines": []}})
    keep = f"open(sys.argv[3], 'w').write({found!r}); print('seen', flush=True)"
    script = tmp_path / "child.py"
    script.write_text("import sys; " + program.format(keep=keep))
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    arguments = gpu_check._parser().parse_args(["--device", "cpu"])
    report = gpu_check.finish(gpu_check.start(stages()["large"], arguments, str(tmp_path)), 1.0)
    assert report["status"] == status
    assert report["reason"] == reason
    assert report["result"] == {"lines": []}
    assert "seen" in report["log"]


@pytest.mark.parametrize(
    ("outcome", "status", "reason"),
    [
        (SkipStage("no data"), "skipped", "no data"),
        (ValueError("broken"), "failed", "ValueError: broken"),
        ({"failures": ["one", "two"]}, "failed", "one; two"),
        ({"failures": []}, "passed", ""),
    ],
)
def test_how_a_stage_ends(
    outcome: Exception | Result, status: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(context: Context) -> Result:
        context.save({"lines": [1]})
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(gpu_check, "stages", lambda: {"large": replace(large.STAGE, run=run)})
    monkeypatch.setattr("sys.stdin", io.StringIO("60\n"))
    path = tmp_path / "report.json"
    arguments = gpu_check._parser().parse_args(["--device", "cpu", "--child", "large", str(path), str(tmp_path)])
    assert gpu_check.run_child(arguments) == 0
    report = json.loads(path.read_text())
    assert (report["status"], report["reason"]) == (status, reason)
    if status == "failed" and isinstance(outcome, ValueError):
        assert report["result"] == {"lines": [1]}


def test_a_stage_has_its_time_from_its_turn_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is ready earlier, and waits."""

    class Waiting(io.StringIO):
        def readline(self, *_: object) -> str:  # type: ignore[override]
            time.sleep(0.5)
            return "60\n"

    left: list[float] = []

    def run(context: Context) -> Result:
        left.append(context.seconds_left)
        return {}

    monkeypatch.setattr(gpu_check, "stages", lambda: {"large": replace(large.STAGE, run=run)})
    monkeypatch.setattr("sys.stdin", Waiting())
    arguments = ["--device", "cpu", "--child", "large", str(tmp_path / "report.json"), str(tmp_path)]
    gpu_check.run_child(gpu_check._parser().parse_args(arguments))
    assert 59.9 < left[0] <= 60


def test_help_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        gpu_check.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in stages())
    assert "Exit code" in shown


def test_stages_share_a_victim(tmp_path: Path) -> None:
    training = TrainConfig.for_digits(epochs=1)
    case = Scenario(load("digits", limit=(200, 50)), "digits", "digits_cnn", "badnets", 0.1, training)
    first, second = (make_victim(case, torch.device("cpu"), tmp_path) for _ in range(2))
    other = make_victim(replace(case, seed=1), torch.device("cpu"), tmp_path)
    weights = [victim.model.state_dict() for victim in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert first.seconds == second.seconds
    assert len(list(tmp_path.iterdir())) == 2
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
