"""An op that can be made wrong or slow on purpose, so that the benchmarks' own judgement is tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from bdfast.testing import Inputs, OpSuite, Outputs, suites


@pytest.fixture
def suite() -> OpSuite:
    """hinge_cross_entropy, as it is."""
    return suites()["hinge_cross_entropy"]


@pytest.fixture
def wrong_suite(suite: OpSuite) -> OpSuite:
    """The same, one per mille off on every backend but the reference."""
    right: Callable[[Inputs, str], Outputs] = suite.run

    def run(inputs: Inputs, backend: str) -> Outputs:
        factor = 1.0 if backend == "reference" else 1.001
        return {name: value * factor for name, value in right(inputs, backend).items()}

    cases = tuple(case for case in suite.cases if case.name in ("d3-cifar10", "rows", "sum"))
    return replace(suite, run=run, cases=cases)
