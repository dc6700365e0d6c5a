"""Launches Triton kernels on a driver that compiles for a GPU, and writes down what it is asked to start.

Run as a program, since Triton may be set to interpret kernels where the tests run: prints the findings of
test_triton_launch.py as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from bdfast.triton_kernels import launch

Case = tuple[tuple[Any, ...], dict[str, Any]]  # arguments; constants and options


class _Utils:
    """What loading takes."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), 1, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def unload_module(self, module: Any) -> None:
        return None


class Driver:
    """A GPU on which kernels are loaded and never run."""

    def __init__(self) -> None:
        self.device, self.stream, self.utils = 0, 7, _Utils()
        self.started: list[tuple[Any, tuple[Any, ...]]] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Triton makes one for every compiled kernel that it loads."""

        def start(*arguments: Any) -> None:
            self.started.append((start, arguments))

        return start

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@triton.jit
def scale_kernel(p_x, p_y, factor, N, stride, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x * stride, mask=o_x < N, other=0)
    tl.store(p_y + o_x, b_x * factor + DOUBLE, mask=o_x < N)


def cases() -> dict[str, Case]:
    """Arguments that Triton compiles apart, and some that it does not."""
    x = torch.zeros(64)
    y, half, whole = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int64)
    constants = {"DOUBLE": False, "BLOCK": 64, "num_warps": 4}

    def case(
        a: torch.Tensor = x, b: torch.Tensor = y, n: int = 10, stride: int = 3, factor: float = 2.0, **options: Any
    ) -> Case:
        return (a, b, factor, n, stride), constants | options

    return {
        "aligned": case(),
        "other memory": case(torch.ones(128)),
        "first unaligned": case(x[1:]),
        "second unaligned": case(x, y[1:]),
        "both unaligned": case(x[1:], y[3:]),
        "aligned to 8": case(x[2:]),
        "aligned to 16": case(x[4:]),
        "empty": case(x[:0]),
        "bfloat16": case(half),
        "bfloat16 unaligned": case(half[4:]),
        "int64": case(x, whole),
        "parameter": case(torch.nn.Parameter(torch.zeros(64))),
        "1": case(n=1),
        "0": case(n=0),
        "16": case(n=16),
        "48": case(n=48),
        "-16": case(n=-16),
        "-1": case(n=-1),
        "both 16": case(n=16, stride=16),
        "stride 1": case(stride=1),
        "both 1": case(n=1, stride=1),
        "2^31 - 1": case(n=2**31 - 1),
        "2^31": case(n=2**31),
        "2^31 + 1": case(n=2**31 + 1),
        "-2^31": case(n=-(2**31)),
        "-2^31 - 1": case(n=-(2**31) - 1),
        "factor 1": case(factor=1.0),
        "factor 16": case(factor=16.0),
        "constant": case(DOUBLE=True),
        "block": case(BLOCK=128),
        "warps": case(num_warps=8),
    }


def numbers(arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments of a launch, as the GPU gets them."""
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]


def plainly(*arguments: Any, **options: Any) -> None:
    """As users of Triton launch."""
    scale_kernel[(3,)](*arguments, **options)


def quickly(*arguments: Any, **options: Any) -> None:
    """The same by what is tested."""
    launch.enqueue(scale_kernel, 3, *arguments, **options)


def started(active: Driver, way: Callable[..., None], case: Case) -> tuple[Any, tuple[Any, ...]]:
    """What one launch starts: the compiled kernel, and its arguments."""
    active.started.clear()
    way(*case[0], **case[1])
    (found,) = active.started
    return found


def compare(active: Driver) -> dict[str, Any]:
    """For every case: whether the first and the second ``enqueue`` start what Triton starts, and from where."""
    findings = {}
    for device in (0, 1):
        active.device = device
        for name, case in cases().items():
            plain, first, second = (started(active, way, case) for way in (plainly, quickly, quickly))
            findings[f"{name}, device {device}"] = {
                "same kernel": first[0] is plain[0] and second[0] is plain[0],
                "same grid, stream and function": first[1][:6] == plain[1][:6] == second[1][:6],
                "same arguments": numbers(plain[1][9:14]) == numbers(first[1][9:14]) == numbers(second[1][9:14]),
                "as many": len(plain[1]) == len(second[1]),
                "second is quick": second[1][6:9] == (None, None, None) and isinstance(second[1][9], int),
                "kernel": f"{id(plain[0])}",
            }
    return findings


def hooks(active: Driver) -> dict[str, Any]:
    """Whether those who want to hear of launches do, and what follows when they no longer want to."""
    case = cases()["aligned"]
    heard: list[str] = []
    runtime = triton.knobs.runtime

    def start() -> tuple[Any, ...]:
        return started(active, quickly, case)[1]

    def listen(metadata: Any) -> None:
        heard.append(metadata.get()["name"])

    runtime.launch_enter_hook.add(listen)
    metadata, enter = start()[6:8]
    enter(metadata)
    runtime.launch_enter_hook.remove(listen)
    quiet = start()[6:9]

    runtime.launch_exit_hook.add(listen)
    exit_too = start()[8] is runtime.launch_exit_hook
    runtime.launch_exit_hook.remove(listen)

    before: list[Any] = []
    scale_kernel.pre_run_hooks.append(lambda *a, **k: before.append(a))
    start()
    scale_kernel.pre_run_hooks.clear()

    runtime.debug = True
    debugged = started(active, quickly, case)[0]
    runtime.debug = False
    return {
        "heard": heard,
        "quiet": quiet,
        "exit": exit_too,
        "before": len(before),
        "debug": debugged is not started(active, quickly, case)[0],
    }


def main() -> None:
    """Print what was found."""
    active = Driver()
    driver.set_active(active)
    print(json.dumps({"known": not launch.plain, "cases": compare(active), "hooks": hooks(active)}))


if __name__ == "__main__":
    main()
