"""Steps that are captured: each call happens once, and those that a graph would not repeat stay as they are."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from bdfast.runtime.graphed import Graphed, Replayed

CUDA = torch.device("cuda")
CALLS = 7


def test_on_a_cpu_every_call_is_the_steps_own() -> None:
    total = torch.zeros(2)
    step = Replayed(lambda x: total.add_(x).clone(), torch.device("cpu"))
    for call in range(CALLS):
        assert torch.equal(step(torch.ones(2)), torch.full((2,), call + 1.0))
    assert step.reason == "steps run on cpu"


@pytest.mark.gpu
def test_every_call_happens_once() -> None:
    total = torch.zeros(2, device=CUDA)
    step = Replayed(lambda x: total.add_(x).sum(), CUDA)
    for call in range(CALLS):
        assert float(step(torch.full((2,), float(call), device=CUDA))) == call * (call + 1)
    assert step.reason == ""
    assert len(step._captured) == 1


@pytest.mark.gpu
def test_a_graph_a_shape() -> None:
    total = torch.zeros((), device=CUDA)
    step = Replayed(lambda x: total.add_(x.sum()).clone(), CUDA)
    sizes = [4, 4, 3, 4, 4, 3, 3, 4, 3, 3, 4]
    for count, size in enumerate(sizes, start=1):
        assert float(step(torch.ones(size, device=CUDA))) == sum(sizes[:count])
    assert len(step._captured) == 2


@pytest.mark.gpu
def test_random_numbers_of_the_device_are_those_of_plain_calls() -> None:
    torch.cuda.manual_seed(3)
    plain = [torch.rand(5, device=CUDA) for _ in range(CALLS)]
    torch.cuda.manual_seed(3)
    step = Replayed(lambda x: x + torch.rand(5, device=CUDA), CUDA)
    for expected in plain:
        assert torch.equal(step(torch.zeros(5, device=CUDA)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "draw",
    [lambda: float(torch.rand(())), random.random, lambda: float(np.random.rand())],  # noqa: NPY002
    ids=["torch", "random", "numpy"],
)
def test_random_numbers_of_the_host_are_drawn_at_every_call(draw: object) -> None:
    step = Replayed(lambda x: x + draw(), CUDA)  # type: ignore[operator]
    seen = [float(step(torch.zeros((), device=CUDA))) for _ in range(CALLS)]
    assert step.reason == "a step draws random numbers on the host"
    assert len(set(seen)) == CALLS


@pytest.mark.gpu
def test_a_step_that_waits_for_the_device_goes_on_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    def step_(x: Tensor) -> Tensor:
        return x + 1 if x.sum().item() > 0 else x - 1

    step = Replayed(step_, CUDA)
    for call in range(CALLS):
        x = torch.tensor([1.0 if call % 2 else -1.0], device=CUDA)
        assert torch.equal(step(x), 2 * x)
    assert step.reason.startswith("a step waits for the device")
    assert "without a CUDA graph: a step waits for the device" in caplog.text


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_steps_as_they_are() -> None:
    def step_(x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # an error during a capture
        return x + 1

    step = Replayed(step_, CUDA)
    for _ in range(CALLS):
        assert float(step(torch.zeros((), device=CUDA))) == 1
    assert step.reason.startswith("the capture failed")


@pytest.mark.gpu
def test_functions_without_effects_are_captured_at_once() -> None:
    double = Graphed(lambda x: x.mul_(2))
    x = torch.ones(3, device=CUDA)
    first = double(x)
    assert torch.equal(first, torch.full((3,), 2.0, device=CUDA))
    assert torch.equal(x, torch.ones(3, device=CUDA))
    double(torch.zeros(3, device=CUDA))
    assert float(first.sum()) == 6  # not written over
