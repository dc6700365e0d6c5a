"""The device and the stream of a launch, without objects made for each: those take longer than a small kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_HERE = nullcontext()
_current_device: Any = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device: make it the tensor's. On the CPU there is none."""
    if not tensor.is_cuda or tensor.get_device() == _current_device():  # CUDA is up: a tensor is there
        return _HERE
    return torch.cuda.device(tensor.device)


def stream_of(tensor: Tensor) -> int:
    """Handle of the current stream of the tensor's device."""
    if _raw_stream is None:
        return torch.cuda.current_stream(tensor.device).cuda_stream
    return int(_raw_stream(tensor.get_device()))
