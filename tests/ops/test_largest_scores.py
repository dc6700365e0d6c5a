"""largest_scores: the definition by a plain sort, ties, non-finite scores, determinism and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdfast.ops import largest_scores

BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])
LOWEST = torch.finfo(torch.float32).min


def by_sorting(scores: list[float], k: int) -> list[int]:
    return [i for _, i in sorted((-s, i) for i, s in enumerate(scores) if not math.isnan(s))][:k]


@BACKENDS
def test_by_hand(backend: str) -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0])
    assert largest_scores(scores, 3, backend=backend).tolist() == [1, 3, 2]
    assert largest_scores(scores, 9, backend=backend).tolist() == [1, 3, 2, 0]
    assert largest_scores(scores, 0, backend=backend).tolist() == []
    assert largest_scores(scores[:0], 2, backend=backend).tolist() == []


@BACKENDS
def test_infinities_are_the_ends_and_nan_is_never_selected(backend: str) -> None:
    scores = torch.tensor([-math.inf, LOWEST, math.nan, math.inf, 0.0, -math.inf, math.inf, -math.nan])
    assert largest_scores(scores, 8, backend=backend).tolist() == [3, 6, 4, 1, 0, 5]
    assert largest_scores(scores, 5, backend=backend).tolist() == [3, 6, 4, 1, 0]
    assert largest_scores(scores, 4, backend=backend).tolist() == [3, 6, 4, 1]


@BACKENDS
def test_ties_go_to_the_lower_index(backend: str) -> None:
    assert largest_scores(torch.full((3000,), 0.25), 700, backend=backend).tolist() == list(range(700))
    assert largest_scores(torch.tensor([-0.0, 0.0, -0.0, 1e-45, 0.0]), 4, backend=backend).tolist() == [3, 0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1.0, 1.5, math.inf, math.nan]), max_size=60),
    k=st.integers(0, 70),
    backend=st.sampled_from(["cpp", "reference"]),
)
def test_is_a_stable_descending_sort(scores: list[float], k: int, backend: str) -> None:
    assert largest_scores(torch.tensor(scores), k, backend=backend).tolist() == by_sorting(scores, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    scores = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)).to(dtype)[:, 1]
    assert largest_scores(scores, 90).tolist() == by_sorting(scores.tolist(), 90)


def test_threads_and_reruns_do_not_change_the_selection() -> None:
    scores = (torch.randn(200_001, generator=torch.Generator().manual_seed(0)) * 50).round()  # many ties
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            found.append(largest_scores(scores, 10_000))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(found[0], scores.argsort(descending=True, stable=True)[:10_000])


def test_leaves_scores_that_require_grad_alone() -> None:
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    assert largest_scores(scores, 1).tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.zeros(2, 2), 1), ValueError, r"`scores` expected shape \[N\], got \[2, 2\]"),
        ((torch.zeros(2).int(), 1), TypeError, "`scores` expected float32"),
        (([1.0], 1), TypeError, "`scores` expected a tensor"),
        ((torch.zeros(2), -1), ValueError, "`k` expected an integer >= 0, got -1"),
        ((torch.zeros(2), 1.5), TypeError, "`k` expected an integer, got float"),
    ],
)
def test_errors_name_the_argument(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"largest_scores: {text}"):
        largest_scores(*arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: largest_scores(s, 3), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for scores in ([0.5, 2.0, -1.0, 3.0], [0.5, -torch.inf, torch.nan, -torch.inf], [torch.nan] * 4):
        assert torch.equal(compiled(torch.tensor(scores)), largest_scores(torch.tensor(scores), 3))
