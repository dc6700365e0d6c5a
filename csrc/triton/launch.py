"""Launches of compiled kernels with little Python.

``kernel[grid](...)`` finds out at each call which compiled kernel is meant: binder, options and hooks take longer than
a kernel is at work on a batch of CIFAR-10's logits. :func:`enqueue` keeps what was found, under a key of whatever
Triton specialises on, and makes the call with which Triton ends.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

INT32 = 2**31

# How JITFunction.run ends from Triton 3.4 to 3.9. Where it reads otherwise, and in the interpreter, launches are plain.
_END = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values()) return kernel"
)


def _is_known() -> bool:
    try:
        return " ".join(inspect.getsource(JITFunction.run).split()).endswith(_END)
    except (OSError, TypeError):  # no source, no function
        return False


plain = not _is_known()  # whether to launch as users of Triton do
_knobs: Any = getattr(triton, "knobs", None)
_found: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def enqueue(kernel: Any, programs: int, *arguments: Tensor | int | float, num_warps: int, **constants: Any) -> None:
    """``kernel[(programs,)](*arguments, **constants, num_warps=num_warps)``, on the current device and stream.

    Args:
        kernel: a ``@triton.jit`` function whose constants come last.
        programs: of a grid of one dimension.
        arguments: all that are no constants, in order.
        num_warps: of a program.
        constants: every ``tl.constexpr``, by name.
    """
    if plain or type(kernel) is not JITFunction or _is_watched(kernel):
        kernel[(programs,)](*arguments, **constants, num_warps=num_warps)
        return
    active = driver.active
    device = active.get_current_device()
    key = [id(kernel), device, num_warps, *constants, *constants.values(), _knobs.runtime.debug]
    values = _specialise(arguments, key)
    found = _found.get(tuple(key))
    if found is None:
        compiled = kernel[(programs,)](*arguments, **constants, num_warps=num_warps)
        if _fits(kernel, compiled, len(arguments), constants):  # the kernel is kept, so that its id stays its own
            _found[tuple(key)] = (compiled.run, compiled.function, compiled.packed_metadata, compiled, kernel)
        return
    run, function, metadata = found[:3]
    stream = active.get_current_stream(device)
    # Constants hold places, for they are in the compiled kernel; there is nobody to tell of the launch.
    run(programs, 1, 1, stream, function, metadata, None, None, None, *values, *constants)


def _specialise(arguments: tuple[Any, ...], key: list[Any]) -> list[Any]:
    """Add to ``key`` what Triton compiles apart; the arguments with addresses for tensors."""
    values = []
    for value in arguments:
        kind = type(value)
        if kind is int:  # 1 becomes a constant
            key.append(value == 1 or (value & 15 == 0, -INT32 <= value < INT32))
        elif kind is float:
            key.append(kind)
        else:
            key.append(value.dtype)
            value = value.data_ptr()
            key.append(value & 15 == 0)
        values.append(value)
    return values


def _is_watched(kernel: Any) -> bool:
    """Whether somebody, such as a profiler, is to hear of launches or changes what is launched."""
    runtime = _knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)  # an empty chain is no hook
        or getattr(leave, "calls", leave)
        or kernel.pre_run_hooks
        or getattr(runtime, "add_stages_inspection_hook", None)
        or getattr(_knobs.compilation, "instrumentation_mode", "")
    )


def _fits(kernel: Any, compiled: Any, count: int, constants: dict[str, Any]) -> bool:
    """Whether ``compiled`` can be called again, and the key holds all that decides about it.

    For CUDA only: for other GPUs Triton also looks at the sizes of tensors.
    """
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    return (
        isinstance(compiled, CompiledKernel)
        and compiled.metadata.target.backend == "cuda"
        and constexprs == set(constants) == set(kernel.arg_names[count:])
    )
