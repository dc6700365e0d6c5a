"""A function of tensors as one CUDA graph: thousands of launches become one.

At batch 128 a ResNet-18 on 32x32 images launches some 60 kernels a forward pass and as many backward, most of a few
microseconds: without a graph the GPU waits for Python. A training step of PreAct-ResNet18 in bfloat16 takes 2.8 ms on
an H200 when it is replayed, and 9.4 ms when Python launches it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bdfast.runtime.determinism import host_random_state

Signature: TypeAlias = "tuple[tuple[torch.Size, torch.dtype, tuple[int, ...]], ...]"

_LOG = logging.getLogger(__name__)
_WARM_UP = 3  # calls before the capture: lazy initialisation, autotuning and the allocator's pools


class _Capture(NamedTuple):
    """A graph, the tensors that it reads its inputs from, and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    held: tuple[Tensor, ...]
    output: Tensor

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for place, x in zip(self.held, inputs, strict=True):
            place.copy_(x)
        self.graph.replay()
        return self.output


def signature_of(inputs: tuple[Tensor, ...]) -> Signature:
    """What a graph is captured for."""
    return tuple((x.shape, x.dtype, x.stride()) for x in inputs)


class Graphed:
    """Calls ``function`` on the CPU; on a GPU captures it once for each signature of its inputs, then replays.

    Args:
        function: tensors to one tensor. It may write into its inputs (into copies of them, that is), must not wait for
            the GPU, and anything else that it reads must stay where it is in memory. Python runs at the capture alone:
            numbers are those of then.

    Example:
        >>> double = Graphed(lambda x: x.mul_(2))
        >>> double(torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._captured: dict[Signature, _Capture] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if inputs[0].device.type != "cuda":
            return self._function(*inputs)
        signature = signature_of(inputs)
        if signature not in self._captured:
            self._captured[signature] = self._capture(inputs)
        return self._captured[signature].replay(inputs).clone()  # the next replay writes over it

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Capture:
        held = tuple(x.detach().clone() for x in inputs)
        # A stream of its own, as capturing asks for; the two wait for each other.
        stream = torch.cuda.Stream(inputs[0].device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(inputs[0].device))
        with torch.cuda.device(inputs[0].device), torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._function(*held)
        torch.cuda.current_stream(inputs[0].device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(inputs[0].device), torch.cuda.graph(graph):
            output = self._function(*held)
        return _Capture(graph, held, output)


class Replayed:
    """A step of a loop, with effects: every call happens once, by Python at first and as a CUDA graph from then on.

    The first calls of each signature of inputs run as they are, and the last of them is watched: a step that makes the
    host wait for the device cannot be captured, one that draws random numbers on the host would repeat them, and both
    go on as they are. So does one whose capture fails, and any on a CPU.

    Args:
        step: tensors to one tensor; it may change whatever it closes over, which must stay where it is in memory.
            Python in it runs at the first calls and at the capture alone.
        device: where; nothing is captured elsewhere than on a GPU.

    Attributes:
        reason: why steps are not captured; empty where they are, or may be.

    Example:
        >>> weights = torch.ones(2)
        >>> step = Replayed(lambda x: weights.sub_(x).sum(), torch.device("cpu"))
        >>> step(torch.ones(2)), step(torch.ones(2)), step.reason
        (tensor(0.), tensor(-2.), 'steps run on cpu')
    """

    def __init__(self, step: Callable[..., Tensor], device: torch.device) -> None:
        self._step, self._device = step, device
        self.reason = "" if device.type == "cuda" else f"steps run on {device.type}"
        self._calls: dict[Signature, int] = {}
        self._captured: dict[Signature, _Capture] = {}
        self._pool: Any = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the step returns; a later call may write over it."""
        if self.reason:
            return self._step(*inputs)
        signature = signature_of(inputs)
        calls = self._calls[signature] = self._calls.get(signature, 0) + 1
        if calls < _WARM_UP:
            return self._step(*inputs)
        if calls == _WARM_UP:
            with _watched(self._device) as obstacles:
                output = self._step(*inputs)
            self._give_up_for(next(iter(obstacles), ""))
            return output
        if signature not in self._captured and not self._capture(signature, inputs):
            return self._step(*inputs)
        return self._captured[signature].replay(inputs)

    def _capture(self, signature: Signature, inputs: tuple[Tensor, ...]) -> bool:
        held = tuple(x.detach().clone() for x in inputs)
        # Graphs of one loop are never replayed at the same time: they share their memory.
        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
                output = self._step(*held)
        except RuntimeError as error:  # of CUDA, or of memory: nothing has run, so that the step can be taken as it is
            self._give_up_for(f"the capture failed: {str(error).splitlines()[0]}")
            return False
        self._captured[signature] = _Capture(graph, held, output)
        return True

    def _give_up_for(self, reason: str) -> None:
        self.reason = reason
        if reason:
            _LOG.info("steps run as they are, without a CUDA graph: %s", reason)


@contextmanager
def _watched(device: torch.device) -> Iterator[list[str]]:
    """What happens inside that a graph would not repeat."""
    obstacles: list[str] = []
    drawn, mode = host_random_state(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught, torch.cuda.device(device):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield obstacles
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "Synchronization debug mode is a prototype" in str(warning.message):
            continue
        if "synchronizing CUDA operation" in str(warning.message):
            obstacles.append(f"a step waits for the device: {str(warning.message).splitlines()[0]}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if host_random_state() != drawn:
        obstacles.append("a step draws random numbers on the host")
