"""csrc/cuda/smallest_per_class.cu, run on the CPU, against the reference."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from bdfast.ops.smallest_per_class import reference
from bdfast.testing import Case, suites
from tests.cuda_on_cpu.library import build

SUITE = suites()["smallest_per_class"]
CASES = [case for case in SUITE.cases if not case.benchmark and case.name not in ("chunks", "mostly-padding")]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = build("smallest_per_class", tmp_path_factory.mktemp("cuda_on_cpu"))
    built.select_smallest.restype = ctypes.c_char_p
    return built


def select(
    library: ctypes.CDLL, scores: Tensor, labels: Tensor, k: int, num_classes: int, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    s, y = scores.float().contiguous(), labels.contiguous()
    indices = torch.full((num_classes, k), -7)
    counts = torch.full((num_classes,), -7)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (s, y, indices, counts)]
    sizes = [ctypes.c_int64(value) for value in (len(s), k, num_classes)]
    if message := library.select_smallest(*pointers[:2], *sizes, int(reverse), *pointers[2:]):
        raise RuntimeError(message.decode())
    return indices, counts


def check(library: ctypes.CDLL, scores: Tensor, labels: Tensor, k: int, num_classes: int) -> None:
    expected = reference(scores, labels, k, num_classes)
    for reverse in (False, True):  # the order of the blocks, and so of the atomics, cannot be seen
        for got, wanted in zip(select(library, scores, labels, k, num_classes, reverse), expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(library: ctypes.CDLL, case: Case) -> None:
    inputs = SUITE.inputs(case)
    inputs["k"] = min(inputs["k"], max(1, len(inputs["scores"])))
    check(library, **inputs)


@pytest.mark.parametrize("classes", [1, 2, 1023, 1024, 1025, 1500])
def test_classes_within_and_past_shared_memory(library: ctypes.CDLL, classes: int) -> None:
    check(
        library,
        torch.randn(2500),
        torch.randint(min(classes, 40), (2500,)) * (classes // 40 or 1) % classes,
        9,
        classes,
    )


@pytest.mark.parametrize("k", [1, 2, 3, 31, 32, 33, 256, 257, 1000, 4999, 5000])
def test_any_k(library: ctypes.CDLL, k: int) -> None:
    """The threshold falls anywhere in a digit, and the network sorts any number of keys."""
    scores = torch.randn(5000)
    scores[1000:3000] = 0.25  # a tie that reaches into the digits of the index
    check(library, scores, torch.zeros(5000, dtype=torch.int64), k, 1)


def test_label_out_of_range_is_left_out(library: ctypes.CDLL) -> None:
    scores, labels = torch.tensor([1.0, 0.0, 2.0, -1.0]), torch.tensor([0, 3, 0, -(2**40)])
    indices, counts = select(library, scores, labels, 2, 3)
    assert indices.tolist() == [[0, 2], [-1, -1], [-1, -1]]
    assert counts.tolist() == [2, 0, 0]
