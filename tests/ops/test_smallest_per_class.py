"""smallest_per_class: the definition by a plain sort, ties, non-finite scores, the padded result and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdfast.backends import BackendUnavailableError, find
from bdfast.errors import LabelRangeError
from bdfast.ops import smallest_per_class
from bdfast.testing import suites
from bdfast.testing.ops.smallest_per_class import class_loop

BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])
SCORES = torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0, -1.0])
LABELS = torch.tensor([0, 0, 0, 0, 2, 2])


def by_sorting(scores: list[float], labels: list[int], k: int, num_classes: int) -> list[int]:
    chosen = []
    for label in range(num_classes):
        members = [(s, i) for i, (s, c) in enumerate(zip(scores, labels, strict=True)) if c == label and s < math.inf]
        chosen += [i for _, i in sorted(members)[:k]]
    return chosen


@BACKENDS
def test_by_hand(backend: str) -> None:
    """Class 0 has a tie at 1.0, class 1 nobody, class 2 fewer than k."""
    assert smallest_per_class(SCORES, LABELS, 3, 3, backend=backend).tolist() == [1, 3, 2, 5, 4]
    assert smallest_per_class(SCORES, LABELS, 1, 3, backend=backend).tolist() == [1, 5]


@BACKENDS
def test_never_selects_what_is_not_below_infinity(backend: str) -> None:
    scores = torch.tensor([math.nan, math.inf, 5.0, -math.inf, -math.nan, -5.0])
    chosen = smallest_per_class(scores, torch.zeros(6, dtype=torch.int64), 6, 1, backend=backend)
    assert chosen.tolist() == [3, 5, 2]


@BACKENDS
def test_zeros_of_both_signs_tie(backend: str) -> None:
    scores = torch.tensor([0.0, -0.0, 0.0, -0.0, -1e-45, 1e-45])
    assert smallest_per_class(scores, torch.zeros(6, dtype=torch.int64), 5, 1, backend=backend).tolist() == [
        4,
        0,
        1,
        2,
        3,
    ]


@BACKENDS
def test_raw_op_pads(backend: str) -> None:
    raw: Any = torch.ops.bdfast.smallest_per_class
    indices, counts = raw(SCORES, LABELS, 3, 4, backend)
    assert indices.tolist() == [[1, 3, 2], [-1] * 3, [5, 4, -1], [-1] * 3]
    assert counts.tolist() == [3, 0, 2, 0]


@BACKENDS
def test_nothing_to_select(backend: str) -> None:
    none = smallest_per_class(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 3, 2, backend=backend)
    assert none.shape == (0,)
    assert none.dtype == torch.int64
    worst = torch.full((4,), math.inf)
    assert smallest_per_class(worst, torch.zeros(4, dtype=torch.int64), 3, 2, backend=backend).shape == (0,)


def test_agrees_with_the_loop_that_users_write() -> None:
    scores, labels = torch.randn(3000), torch.randint(12, (3000,))
    assert torch.equal(smallest_per_class(scores, labels, 40, 12), class_loop(scores, labels, 40, 12))


@settings(max_examples=100, deadline=None)
@given(
    data=st.lists(
        st.tuples(
            st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan])),
            st.integers(0, 4),
        ),
        max_size=60,
    ),
    k=st.integers(1, 70),
    backend=st.sampled_from(["cpp", "reference"]),
)
def test_is_a_sort_cut_off(data: list[tuple[float, int]], k: int, backend: str) -> None:
    scores, labels = [s for s, _ in data], [c for _, c in data]
    chosen = smallest_per_class(torch.tensor(scores), torch.tensor(labels, dtype=torch.int64), k, 5, backend=backend)
    assert chosen.tolist() == by_sorting(scores, labels, k, 5)


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(0, 3000),
    classes=st.integers(1, 300),
    k=st.integers(1, 400),
    balance=st.sampled_from(["even", "gaps", "one"]),
    special=st.sampled_from(["", "ties", "equal", "zeros", "non-finite"]),
)
def test_backends_agree(size: int, classes: int, k: int, balance: str, special: str) -> None:
    options = {"shape": (size,), "classes": classes, "k": k, "balance": balance, "special": special}
    inputs = suites()["smallest_per_class"].make(torch.device("cpu"), torch.float32, **options)
    raw = find("smallest_per_class").call
    for a, b in zip(raw(*inputs.values(), "cpp"), raw(*inputs.values(), "reference"), strict=True):
        assert torch.equal(a, b)


def test_any_integer_will_do() -> None:
    numpy = pytest.importorskip("numpy")
    assert smallest_per_class(SCORES, LABELS, numpy.int32(1), numpy.int64(3)).tolist() == [1, 5]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_compaction_of_full_and_of_partial_classes(k: int) -> None:
    """Classes of 3 and 4 samples: all full up to k = 3."""
    scores = torch.tensor([0.3, 0.1, 0.2, 0.5, 0.4, 0.6, 0.0])
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    expected = [1, 2, 0][:k] + [6, 4, 3, 5][:k]
    for backend in ("auto", "reference"):
        assert smallest_per_class(scores, labels, k, 2, backend=backend).tolist() == expected


@pytest.mark.parametrize("k", [1, 3, 4])  # full classes, and partial ones
def test_compiles_without_graph_break(k: int) -> None:
    compiled = torch.compile(lambda s: smallest_per_class(s * 2, LABELS, k, 3) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(SCORES), smallest_per_class(SCORES, LABELS, k, 3) + 1)


def test_raw_op_compiles_without_graph_break() -> None:
    raw: Any = torch.ops.bdfast.smallest_per_class
    compiled = torch.compile(lambda s: raw(s * 2, LABELS, 2, 3, "auto")[0] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(SCORES), raw(SCORES, LABELS, 2, 3, "auto")[0] + 1)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((SCORES[None], LABELS, 1, 3), ValueError, r"smallest_per_class: `scores` expected shape \[N\], got \[1, 6\]"),
        ((SCORES.int(), LABELS, 1, 3), TypeError, "`scores` expected float32"),
        ((SCORES.tolist(), LABELS, 1, 3), TypeError, r"`scores` expected a tensor \[N\], got list"),
        ((SCORES, LABELS.int(), 1, 3), TypeError, "`labels` expected int64 class labels"),
        ((SCORES, LABELS[:2], 1, 3), ValueError, r"`labels` expected one label a row of scores, \[6\], got \[2\]"),
        ((SCORES, LABELS, 0, 3), ValueError, "`k` expected an integer >= 1, got 0"),
        ((SCORES, LABELS, 1.5, 3), TypeError, "`k` expected an integer, got float"),
        ((SCORES, LABELS, 1, 0), ValueError, "`num_classes` expected an integer >= 1, got 0"),
    ],
)
def test_errors_name_the_argument(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        smallest_per_class(*arguments)


@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
@pytest.mark.parametrize(("label", "classes"), [(-1, 3), (3, 3), (2**40, 3), (-1, 10**7)])
def test_label_out_of_range(backend: str, label: int, classes: int) -> None:
    with pytest.raises(LabelRangeError, match=rf"`labels` expected labels in \[0, {classes}\), got {label} at index 1"):
        smallest_per_class(torch.zeros(2), torch.tensor([0, label]), 1, classes, backend=backend)


def test_named_backend_raises_its_reason() -> None:
    with pytest.raises(BackendUnavailableError, match=r"backend 'cpp' cannot run: supports float32, .* got float64"):
        smallest_per_class(SCORES.double(), LABELS, 1, 3, backend="cpp")
    with pytest.raises(BackendUnavailableError, match="backend 'cuda' cannot run: needs CUDA tensors"):
        smallest_per_class(SCORES, LABELS, 1, 3, backend="cuda")
