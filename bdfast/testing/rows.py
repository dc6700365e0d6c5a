"""What is timed for a case of an op: bdfast, what users write instead, and a copy of as many bytes.

Everything comes from :func:`bdfast.testing.suites`, so a new op appears in every benchmark by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bdfast.testing import Case, Inputs, OpSuite, parity, suites
from bdfast.testing.tables import Cell, Table
from bdfast.testing.timing import Step, Timing

OURS = "bdfast"
COPY = "copy"  # destination.copy_(source) into memory that is there already: the floor of what moves these bytes
BASELINES = ("usual", "eager", "compile")  # in the order of the tables


def cases(
    *, large: bool = False, op: str = "", case: str = "", dtype: str = ""
) -> Iterator[tuple[OpSuite, Case, torch.dtype]]:
    """Every benchmarked case of every op, or those whose names contain the words given."""
    for suite in suites().values():
        for found in suite.cases:
            if not found.benchmark or (found.large and not large) or op not in suite.name or case not in found.name:
                continue
            for kind in found.dtypes:
                if dtype in dtype_name(kind):
                    yield suite, found, kind


def small_case(suite: OpSuite) -> Case:
    """A case for trying things out: the first of the tests' own that moves anything."""
    few = (case for case in suite.cases if not case.benchmark and not case.large)
    return next(case for case in few if suite.bytes_moved(suite.inputs(case, dtype=case.dtypes[0])) > 0)


def dtype_name(dtype: torch.dtype) -> str:
    """Without the ``torch.``"""
    return str(dtype).removeprefix("torch.")


def makers(suite: OpSuite, *, compiled: bool = True) -> dict[str, Callable[[Inputs], Step]]:
    """Row name -> function from inputs to what is timed; each row gets inputs of its own, since steps change them."""
    found: dict[str, Callable[[Inputs], Step]] = {OURS: lambda inputs: suite.step(inputs, "auto")}
    found |= {name: make for name, make in suite.baselines.items() if compiled or name != "compile"}
    found[COPY] = lambda inputs: copy_step(suite.bytes_moved(inputs), _device(inputs))
    return found


def prepare(
    suite: OpSuite, case: Case, device: torch.device, dtype: torch.dtype, *, compiled: bool = True
) -> tuple[dict[str, Step], int]:
    """Row name -> what is timed, and the bytes that a call has to move."""
    if compiled:
        torch.compiler.reset()  # dynamo falls back to eager, silently, after eight shapes of one function
    moved = 0
    steps: dict[str, Step] = {}
    for name, make in makers(suite, compiled=compiled).items():
        inputs = suite.inputs(case, device, dtype)
        moved = suite.bytes_moved(inputs)
        steps[name] = make(inputs)
    return steps, moved


def copy_step(bytes_moved: int, device: torch.device) -> Step:
    """A copy that reads and writes ``bytes_moved`` bytes in all."""
    source = torch.rand(max(1, bytes_moved // 8), device=device)
    destination = torch.empty_like(source)
    return lambda: destination.copy_(source)


def failures(suite: OpSuite, case: Case, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What the op gets wrong on this case, against float64; nothing is timed where this is not empty."""
    return [str(mismatch) for mismatch in parity(suite, case, "auto", device, dtype)]


def record(suite: OpSuite, case: Case, dtype: torch.dtype, moved: int, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """One line of a result file."""
    rounds = {name: timing.record() for name, timing in timings.items()}
    return {**identity(suite, case, dtype), **figures(moved, timings), "rows": rounds}


def figures(moved: int, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """What is worth a table; ``ratios`` say how many times as long the others take."""
    ours = timings[OURS]
    return {
        "bytes": moved,
        "us": round(ours.median * 1e6, 3),
        "ratios": {name: round(ours.times(t), 4) for name, t in timings.items() if name not in (OURS, COPY)},
        "gb_per_s": round(moved / ours.median / 1e9, 3),
        "share_of_copy": round(ours.times(timings[COPY]), 4),
    }


def identity(suite: OpSuite, case: Case, dtype: torch.dtype) -> dict[str, str]:
    """What a line of a result file is about."""
    return {"op": suite.name, "case": case.name, "dtype": dtype_name(dtype)}


def failed_record(suite: OpSuite, case: Case, dtype: torch.dtype, reasons: list[str]) -> dict[str, Any]:
    """A line without timings."""
    return {**identity(suite, case, dtype), "failures": reasons}


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Median and ratios of lines that :func:`record` made, or why there are none."""
    header = ["op", "case", "dtype", "us", *(f"vs {name}" for name in BASELINES), "GB/s", "of copy"]
    lines: list[list[Cell]] = []
    for line in records:
        head: list[Cell] = [line["op"], line["case"], line["dtype"]]
        if "failures" in line:
            lines.append([*head, None, *(None for _ in BASELINES), None, "wrong"])
            continue
        ratios = [line["ratios"].get(name) for name in BASELINES]
        share = f"{100 * line['share_of_copy']:.0f} %"
        lines.append([*head, line["us"], *ratios, line["gb_per_s"], share])
    return header, lines


def _device(inputs: Inputs) -> torch.device:
    tensors = (item for value in inputs.values() for item in (value if isinstance(value, list) else [value]))
    return next(item.device for item in tensors if isinstance(item, torch.Tensor))
