"""The benchmark of the replaced functions: which there are, what counts as a difference, and how records are merged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bdfast.integrations.backdoorbench.accelerated.replacements import REPLACEMENTS
from benchmarks import backdoorbench_parts, report
from benchmarks.replaced.part import TINY, failures
from benchmarks.replaced.parts import PARTS, elsewhere, largest, other_channels

CPU = torch.device("cpu")


def test_every_replaced_function_has_a_row() -> None:
    assert {name for part in PARTS for name in part.replaces} == {*REPLACEMENTS, "eval_step"}
    names = [part.name for part in PARTS]
    assert len(set(names)) == len(names)


def test_a_wrong_result_is_found() -> None:
    right = next(part for part in PARTS if part.name == "l2")
    assert failures([right.measure(TINY, CPU, 1, TINY)]) == []

    def make(setting: Any) -> Any:
        usual, ours = right.make(setting)
        return usual, lambda: 1.001 * ours()

    (failure,) = failures([replace(right, make=make).measure(TINY, CPU, 1, TINY)])
    assert failure.startswith("l2: results differ by ")
    (failure,) = failures([{"part": "x", "difference": float("nan"), "allowed": 1.0}])
    assert "x: results differ by nan" in failure


def test_differences() -> None:
    one, other = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0])
    assert largest(one, other) == 0.25
    assert largest([one / 8, one], [one / 8, other]) == 0.25
    assert largest(torch.zeros(2), torch.tensor([0.0, 0.5])) == 0.5
    assert elsewhere([3, 1, 0, 2], [3, 0, 1, 2]) == 0.5
    scales = [[torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])]]
    assert other_channels(scales, scales) == 0.0
    assert other_channels(scales, [[torch.ones(2), torch.ones(2)]]) == 0.25
    assert other_channels(scales, [{"a": torch.tensor([0]), "b": torch.tensor([], dtype=torch.int64)}]) == 0.0
    assert other_channels(scales, [{"a": torch.tensor([1]), "b": torch.tensor([], dtype=torch.int64)}]) == 0.5


def test_a_part_replaces_its_own_record_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "backdoorbench_parts.json"
    common = ["--rounds", "1", "--threads", "1", "--write", "--output", str(path)]
    backdoorbench_parts.main(["--parts", "l2", "nad", *common])
    first = json.loads(path.read_text())
    assert not first["complete"]
    assert [record["part"] for record in first["records"]] == ["l2", "nad"]
    backdoorbench_parts.main(["--parts", "l1", "nad", *common])
    second = json.loads(path.read_text())
    assert [record["part"] for record in second["records"]] == ["l1", "l2", "nad"]
    assert second["records"][1] == first["records"][0]
    assert [record["measured"]["command"].split()[2:4] for record in second["records"]] == [
        ["l1", "nad"], ["l2", "nad"], ["l1", "nad"],
    ]  # fmt: skip
    text = report.backdoorbench({"backdoorbench_parts": {**second, "file": path.name}})
    assert "| `Shared_PGD.projection`, `NPD.projection` | L1, 256 perturbations of 3 x 32 x 32 |" in text
    assert text.count("backdoorbench_parts.py --parts") == 2
    assert "(l1, nad)" in text
    assert "(l2)" in text
    capsys.readouterr()


def test_records_of_another_machine_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    arguments = ["--parts", "l2", "--rounds", "1", "--threads", "1", "--write", "--output", str(path)]
    backdoorbench_parts.main(arguments)
    result = json.loads(path.read_text())
    result["environment"]["machine"]["cpu"] = "another"
    path.write_text(json.dumps(result))
    capsys.readouterr()
    assert backdoorbench_parts.main(arguments) == 2
    assert "`--output` expected a result of " in capsys.readouterr().err
    assert json.loads(path.read_text()) == result
