"""Device and stream of a launch."""

from __future__ import annotations

import pytest
import torch

from bdfast.backends.devices import on_device_of, stream_of


def test_on_the_cpu_there_is_no_device() -> None:
    with on_device_of(torch.zeros(1)), on_device_of(torch.zeros(1)):  # one context for all: it may be entered again
        pass


@pytest.mark.gpu
def test_the_stream_is_the_current_one() -> None:
    x = torch.zeros(1, device="cuda")
    assert stream_of(x) == torch.cuda.current_stream(x.device).cuda_stream
    with torch.cuda.stream(torch.cuda.Stream()):
        assert stream_of(x) == torch.cuda.current_stream(x.device).cuda_stream


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_the_device_is_that_of_the_tensor() -> None:
    for index in (0, 1):
        with on_device_of(torch.zeros(1, device=f"cuda:{index}")):
            assert torch.cuda.current_device() == index
    assert torch.cuda.current_device() == 0
