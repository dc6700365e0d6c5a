"""Which (case, backend, dtype) combinations run on this machine."""

from __future__ import annotations

import pytest
import torch

from bdfast.backends import find
from bdfast.testing import Case, OpSuite, suites

# The Triton interpreter takes milliseconds a program: cases with more elements than this are left to the hardware.
INTERPRETED_ELEMENTS = 50_000


def _elements(suite: OpSuite, case: Case) -> int:
    shape = case.options.get("shape")
    shapes = case.options.get("shapes") or (shape,)
    return sum(torch.Size(s).numel() for s in shapes)


def combinations(*, benchmark_cases: bool = True) -> list[pytest.ParameterSet]:
    """Every case of every op on every backend of its op, with a readable id."""
    found = []
    for suite in suites().values():
        for case in suite.cases:
            if case.benchmark and not benchmark_cases:
                continue
            for implementation in find(suite.name).implementations:
                for dtype in case.dtypes:
                    name = f"{suite.name}-{case.name}-{implementation.backend}-{str(dtype).removeprefix('torch.')}"
                    marks = [pytest.mark.large] if case.large else []
                    found.append(pytest.param(suite, case, implementation.backend, dtype, id=name, marks=marks))
    return found


def skip_unless_runnable(suite: OpSuite, case: Case, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Skip with the backend's own reason where it cannot run here."""
    if case.large and device.type == "cpu":
        pytest.skip("needs tens of gigabytes: run on a GPU")
    reason = find(suite.name).reasons(torch.empty(0, device=device, dtype=dtype))[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    if backend == "triton" and device.type == "cpu" and _elements(suite, case) > INTERPRETED_ELEMENTS:
        pytest.skip("too many programs for the Triton interpreter")
