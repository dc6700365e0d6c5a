"""csrc/cuda/histogram_entropy.cu, run on the CPU, against the reference."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from bdfast.ops.histogram_entropy import PARTS, reference
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
    x = x.float().contiguous()
    entropy, parts = torch.full((len(x),), -7.0), torch.empty(3 * PARTS)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, parts, entropy)]
    sizes = (ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1]))
    message = library.entropies(pointers[0], *sizes, ctypes.c_double(step_size), int(compat), *pointers[1:])
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


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 1028), (2, 16_384), (9, 33_332), (300, 1000)])
def test_vectors_and_parts(library: ctypes.CDLL, rows: int, columns: int, offset: int) -> None:
    """Parts end inside rows, threads have several loads, and addresses are a multiple of 16 bytes or are not."""
    x = torch.empty(rows * columns + offset)[offset:].view(rows, columns).normal_()
    x[-1, -1] = 9.0  # the extrema lie at the very ends
    x[0, 0] = -9.0
    torch.testing.assert_close(run(library, x, 0.5, True), reference(x.double(), 0.5, True).float(), rtol=2e-6, atol=0)
