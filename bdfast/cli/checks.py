"""Which backend runs each op here, and whether its numbers are right."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bdfast.backends import Op, explain, find, registered
from bdfast.backends.availability import triton_interpreted
from bdfast.testing import Case, OpSuite, parity, suites

SECONDS = 6.0  # for the numeric checks of all ops together; each runnable backend gets at least one case


@dataclass(frozen=True)
class Choice:
    """Which backend an op takes for tensors of one device and dtype, and the reason of each that it does not."""

    op: str
    device: str
    dtype: str
    chosen: str | None
    requested: str
    reasons: dict[str, str | None]

    @property
    def fault(self) -> str | None:
        """What is wrong with it: a slow backend that nobody asked for, or a wish that cannot be met."""
        where = f"{self.op} ({self.device}, {self.dtype})"
        if self.chosen is None:
            why = self.reasons.get(self.requested) or "this op has no such implementation"
            return f"{where}: backend {self.requested!r} was requested and cannot run: {why}"
        missing = {name: why for name, why in self.reasons.items() if why is not None and _is_for(name, self.device)}
        if self.requested == "auto" and self.chosen == "reference" and missing:
            return f"{where}: falls back to plain PyTorch: {'; '.join(f'{k}: {v}' for k, v in missing.items())}"
        return None


@dataclass(frozen=True)
class Check:
    """What the cases of an op came to on one backend, against the reference in float64."""

    op: str
    backend: str
    device: str
    checked: int  # cases, times dtypes
    total: int
    mismatches: tuple[str, ...]


def devices() -> list[torch.device]:
    """The devices of this machine, one of a kind."""
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def choices() -> Iterator[Choice]:
    """Every op on every device, in every dtype that its cases have."""
    for op in public_ops():
        for device in devices():
            for dtype in _dtypes(suites().get(op.public)):
                found = explain(op.public, device=device, dtype=dtype)
                name = str(dtype).removeprefix("torch.")
                yield Choice(op.public, device.type, name, found.chosen, found.requested, found.reasons)


def public_ops() -> list[Op]:
    """The raw op that each public function calls first."""
    return [find(name) for name in dict.fromkeys(op.public for op in registered())]


def numeric_checks(seconds: float = SECONDS) -> list[Check]:
    """Small cases of every op on every backend that can run here, in turn, until the time is over.

    The Triton interpreter, which tests use, is not a backend of a machine and is left out.
    """
    plan = [
        (suite, implementation.backend, device)
        for suite in suites().values()
        for device in devices()
        for implementation in find(suite.name).implementations
        if implementation.can_run(torch.empty(0, device=device)) is None
        and not (implementation.backend == "triton" and triton_interpreted())
    ]
    small = [
        [(case, d) for case in s.cases if not (case.large or case.benchmark) for d in case.dtypes] for s, *_ in plan
    ]
    results: list[list[list[str]]] = [[] for _ in plan]  # a list of mismatches a case
    end = time.monotonic() + seconds
    for turn in range(max(map(len, small), default=0)):
        for (suite, backend, device), cases, found in zip(plan, small, results, strict=True):
            # A first compilation of a Triton kernel can take a second: one case each, then while there is time.
            if turn < len(cases) and (turn == 0 or time.monotonic() < end):
                found.append(_mismatches(suite, *cases[turn], backend, device))
    return [
        Check(suite.name, backend, device.type, len(found), len(cases), tuple(itertools.chain(*found)))
        for (suite, backend, device), cases, found in zip(plan, small, results, strict=True)
    ]


def _mismatches(suite: OpSuite, case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> list[str]:
    try:
        found = [str(mismatch) for mismatch in parity(suite, case, backend, device, dtype)]
    except Exception as error:  # a kernel that cannot be compiled or launched is a finding like a wrong number
        found = [f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"]
    return [f"{case.name}, {str(dtype).removeprefix('torch.')}: {text}" for text in found]


def _dtypes(suite: OpSuite | None) -> Sequence[torch.dtype]:
    if suite is None:
        return (torch.float32,)
    return tuple(dict.fromkeys(dtype for case in suite.cases for dtype in case.dtypes))


def _is_for(backend: str, device: str) -> bool:
    """Whether a backend is meant for a kind of device."""
    return backend == "cpp" if device == "cpu" else backend in ("cuda", "triton")
