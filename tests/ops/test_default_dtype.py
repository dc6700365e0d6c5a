"""What an op returns depends on its arguments alone, not on the dtype that PyTorch gives to new tensors.

Kernels write float32 at an address: into memory of another dtype they would write past its end, or half of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bdfast.backends import find
from bdfast.testing import OpSuite, suites

from .backends import skip_unless_runnable


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Set for the test where it asks for it, and put back."""
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("suite", suites().values(), ids=lambda suite: suite.name)
def test_results_are_those_of_the_ordinary_default(suite: OpSuite, backend: str, default: torch.dtype) -> None:
    if backend not in find(suite.name).reasons(torch.empty(0)):
        pytest.skip(f"no {backend}")
    for case in (case for case in suite.cases if not case.large and not case.benchmark):
        skip_unless_runnable(suite, case, backend, torch.device("cpu"), case.dtypes[0])
        inputs, same = (suite.inputs(case, "cpu", case.dtypes[0]) for _ in range(2))
        expected = {name: value.clone() for name, value in suite.run(inputs, backend).items()}
        torch.set_default_dtype(default)
        found = suite.run(same, backend)
        torch.set_default_dtype(torch.float32)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.dtype == expected[name].dtype, (case.name, name)
            assert torch.equal(value.nan_to_num(), expected[name].nan_to_num()), (case.name, name)
