"""``bdfast doctor``: its JSON, and what it calls a finding."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bdfast.backends import availability
from bdfast.cli import checks, environment
from bdfast.cli.checks import Check, Choice
from bdfast.cli.commands import doctor
from bdfast.testing import suites
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
NO_GPU = {"devices": [], "device_files": 0, "torch_cuda": None, "driver": None}


def test_an_extra_that_may_not_be_imported_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = next(iter(environment.EXTRAS))

    class Refusing:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == refused:
                raise ImportError(f"no {name} here")

    monkeypatch.delitem(sys.modules, refused, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    assert environment.extras()[refused] is None


def test_json(bdfast: Run) -> None:
    outcome = bdfast("doctor", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == (1 if found["findings"] else 0)
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["extras"]) == set(environment.EXTRAS)
    ops = {choice["op"] for choice in found["ops"]}
    assert {"hinge_cross_entropy", "projected_sgd_step_"} <= ops
    on_cpu = [choice for choice in found["ops"] if choice["device"] == "cpu"]
    assert {choice["op"] for choice in on_cpu} == ops
    if availability.cpp_missing() is None and not torch.cuda.is_available():
        assert found["findings"] == []
    checked = {(check["op"], check["backend"]) for check in found["checks"]}
    assert {(name, "reference") for name in suites()} <= checked
    assert all(check["checked"] >= 1 for check in found["checks"])


def test_text_says_the_same(bdfast: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_version", lambda name: None)
    outcome = bdfast("doctor")
    assert f"torch              {torch.__version__}" in outcome.out
    assert "pip install 'bdfast[triton]'" in outcome.out
    assert "hinge_cross_entropy      reference  cpu   right" in outcome.out
    assert outcome.out.replace("\n", "").isprintable()


def test_missing_extension_is_a_silent_fallback(bdfast: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BDFAST_BACKEND", raising=False)
    monkeypatch.setattr(availability, "cpp_missing", lambda: "the compiled extension is gone")
    outcome = bdfast("doctor")
    assert outcome.code == 1
    assert "FINDING: hinge_cross_entropy (cpu, float32): falls back to plain PyTorch" in outcome.out
    assert "the compiled extension is gone" in outcome.out


def test_asked_for_reference_is_no_fallback(bdfast: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDFAST_BACKEND", "reference")
    found = json.loads(bdfast("doctor", "--json").out)
    assert {choice["chosen"] for choice in found["ops"]} == {"reference"}
    assert found["findings"] == []


def test_wish_that_cannot_be_met_is_a_finding() -> None:
    choice = Choice("op", "cpu", "float32", None, "cuda", {"cuda": "needs CUDA tensors", "reference": None})
    assert choice.fault == "op (cpu, float32): backend 'cuda' was requested and cannot run: needs CUDA tensors"


def test_wish_for_what_the_op_does_not_have() -> None:
    choice = Choice("op", "cpu", "float32", None, "triton", {"reference": None})
    assert choice.fault is not None
    assert "no such implementation" in choice.fault


def test_reference_on_a_gpu_is_a_silent_fallback() -> None:
    reasons = {"cuda": "built without CUDA", "triton": "no triton", "cpp": "needs CPU tensors", "reference": None}
    choice = Choice("op", "cuda", "float32", "reference", "auto", reasons)
    assert choice.fault == (
        "op (cuda, float32): falls back to plain PyTorch: cuda: built without CUDA; triton: no triton"
    )


def test_an_op_without_kernels_does_not_fall_back() -> None:
    assert Choice("op", "cpu", "float32", "reference", "auto", {"reference": None}).fault is None


def test_wrong_numbers_are_a_finding(bdfast: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "parity", lambda *_: ["loss[0]: got 1.0, expected 2.0"])
    outcome = bdfast("doctor")
    assert outcome.code == 1
    assert "wrong numbers" in outcome.out
    assert "WRONG" in outcome.out


def test_a_kernel_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("cannot launch\nlong story")

    monkeypatch.setattr(checks, "parity", fail)
    found = checks.numeric_checks(0.0)
    assert all(check.checked == 1 for check in found)  # out of time after one case
    assert all("RuntimeError: cannot launch" in check.mismatches[0] for check in found)


def test_gpu_that_torch_cannot_use_is_a_finding() -> None:
    found = doctor.findings([], [], {**NO_GPU, "device_files": 1})
    assert len(found) == 1
    assert "no CUDA" in found[0]
    assert doctor.findings([], [Check("op", "cpp", "cpu", 3, 3, ())], NO_GPU) == []


def test_driver_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n")
    assert environment.driver_version(file) == "580.65.06"
    assert environment.driver_version(tmp_path / "none") is None


def test_hidden_gpus_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert environment.device_files() == 0
