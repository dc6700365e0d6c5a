"""csrc/cuda/histogram_entropy.cu, run on the CPU, against the reference."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from bdfast.ops.histogram_entropy import PARTS, _terms
from bdfast.testing import Case, compare, suites, upcast
from tests.cuda_on_cpu.library import build

SUITE = suites()["histogram_entropy"]
CASES = [case for case in SUITE.cases if not case.benchmark and case.name not in ("empty", "no-samples")]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = build("histogram_entropy", tmp_path_factory.mktemp("cuda_on_cpu"))
    built.entropies.restype = ctypes.c_char_p
    return built


def run(library: ctypes.CDLL, x: Tensor, step_size: float, compat: bool) -> Tensor:
    x, terms = x.float().contiguous(), _terms(x)
    entropy, parts = torch.full((len(x),), -7.0), torch.empty(3 * PARTS)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, terms, parts, entropy)]
    sizes = (ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1]))
    message = library.entropies(*pointers[:2], *sizes, ctypes.c_double(step_size), int(compat), *pointers[2:])
    assert not message, message
    return entropy


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(library: ctypes.CDLL, case: Case) -> None:
    expected = SUITE.run(upcast(SUITE.inputs(case)), "reference")
    got = {"entropy": run(library, **SUITE.inputs(case))}
    assert not compare(got, expected, SUITE)


def test_too_many_bins_give_nan(library: ctypes.CDLL) -> None:
    """Where the CPU raises: how many there are is known on the device alone."""
    assert run(library, torch.tensor([[0.0, 1e9], [1.0, 2.0]]), 0.1, True).isnan().all()
    assert run(library, torch.full((2, 3), torch.nan), 0.1, True).isnan().all()
