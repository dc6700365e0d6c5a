"""Timing on a GPU: events with a cold L2, replays of a captured graph, wall time, and what one call launches."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bdfast.testing.timing import Clock, Step, Timing, interleave

WINDOW = "bdfast measured calls"


def event_clock(device: torch.device) -> Clock:
    """Device time between two events around one call, L2 overwritten before it.

    Overwriting also keeps the device busy while the host enqueues the call, as it is in a training loop: launch gaps
    show only where a call takes longer to enqueue than that.
    """
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(4 * l2, 2**26) // 4, dtype=torch.int32, device=device)

    def clock(step: Step, calls: int) -> float:
        pairs = []
        for _ in range(calls):
            flush.zero_()
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record()
            step()
            ended.record()
            pairs.append((began, ended))
        torch.cuda.synchronize(device)
        return float(sum(began.elapsed_time(ended) for began, ended in pairs)) * 1e-3 / calls

    return clock


def wall_clock(step: Step, calls: int) -> float:
    """Wall time of calls one after another, warm caches, until the device is done: what a small op costs a loop."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def capture(step: Step) -> Step:
    """The replay of a CUDA graph of one call.

    Raises:
        RuntimeError: something in the call cannot be captured, such as a sync.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up must not be on the stream that is captured
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Step = graph.replay
    return replay


def capture_all(steps: Mapping[str, Step]) -> tuple[dict[str, Step], dict[str, str]]:
    """Replays by name, and the reason of each that could not be captured."""
    replays, reasons = {}, {}
    for name, step in steps.items():
        try:
            replays[name] = capture(step)
        except Exception as error:  # a baseline may do anything; the others are measured all the same
            torch.cuda.synchronize()
            reasons[name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return replays, reasons


def measure(
    steps: Mapping[str, Step], device: torch.device, seconds: float
) -> tuple[dict[str, dict[str, Timing]], dict[str, str]]:
    """Timings by mode (``plain``, ``graph``, ``wall``) and name, and why a name has no ``graph``."""
    events = event_clock(device)
    plain = interleave(steps, clock=events, seconds=seconds, sample_seconds=0, rounds=(10, 200))
    wall = interleave(steps, clock=wall_clock, seconds=seconds / 2, rounds=(5, 50))
    replays, reasons = capture_all(steps)
    graph = interleave(replays, clock=events, seconds=seconds, sample_seconds=0, rounds=(10, 200)) if replays else {}
    return {"plain": plain, "graph": graph, "wall": wall}, reasons


def activity(step: Step, calls: int = 4) -> dict[str, float]:
    """``kernels`` and ``copies`` (and fills) of one call on the device, ``syncs`` of the host, by torch.profiler."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(WINDOW):
            for _ in range(calls):
                step()
        torch.cuda.synchronize()  # outside the window: not one of the call's own
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return {name: round(count / calls, 2) for name, count in count_activity(events).items()}


def count_activity(events: list[dict[str, Any]]) -> dict[str, int]:
    """Kernels, copies and syncs among the events of a Chrome trace with one :data:`WINDOW`.

    Example:
        >>> window = {"name": WINDOW, "cat": "user_annotation", "ts": 0, "dur": 10}
        >>> sync = {"name": "cudaStreamSynchronize", "cat": "cuda_runtime", "ts": 5, "dur": 1}
        >>> late = {"name": "cudaDeviceSynchronize", "cat": "cuda_runtime", "ts": 11, "dur": 1}
        >>> count_activity([window, sync, late, {"name": "k", "cat": "kernel", "ts": 12, "dur": 1}])
        {'kernels': 1, 'copies': 0, 'syncs': 1}
    """
    window = next(event for event in events if event.get("name") == WINDOW and event.get("cat") == "user_annotation")
    ended = window["ts"] + window["dur"]

    def count(matches: Callable[[dict[str, Any]], bool]) -> int:
        return sum(1 for event in events if matches(event))

    return {
        "kernels": count(lambda event: event.get("cat") == "kernel"),
        "copies": count(lambda event: event.get("cat") in ("gpu_memcpy", "gpu_memset")),
        "syncs": count(
            lambda event: (
                event.get("cat") in ("cuda_runtime", "cuda_driver")
                and ("Synchronize" in event["name"] or event["name"] == "cudaMemcpy")
                and window["ts"] <= event["ts"] <= ended
            )
        ),
    }
