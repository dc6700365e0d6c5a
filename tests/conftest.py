"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

# Without a GPU the Triton kernels run in the interpreter, on CPU tensors; Triton reads this at its first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

# BDFAST_TEST_DEVICES=cuda leaves out what a machine without a GPU tests as well.
EVERY_DEVICE = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DEVICES = [name for name in EVERY_DEVICE if name in os.environ.get("BDFAST_TEST_DEVICES", "cpu cuda").split()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every uninitialised tensor starts as NaN (or the largest integer), so that an element left unwritten shows."""
    plain = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    method = torch.Tensor.new_empty

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

    for name, function in plain.items():
        monkeypatch.setattr(torch, name, lambda *a, _f=function, **k: poison(_f(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(method(*a, **k)))
    return
