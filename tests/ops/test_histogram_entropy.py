"""histogram_entropy: entropies by hand, strict and closed bins, the edges that float32 makes, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdfast.backends import BackendUnavailableError
from bdfast.ops import histogram_entropy
from bdfast.testing.ops.histogram_entropy import bin_loop

BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])


def entropy(*shares: float) -> float:
    return -sum(p * math.log(p) for p in shares)


@BACKENDS
def test_by_hand(backend: str) -> None:
    """Range [0, 3.5], so edges 0, 1, 2, 3: the minimum and 2.0 lie on an edge, 3.2 and 3.5 above the last one."""
    x = torch.tensor([[0.0, 0.5, 0.5, 1.5], [2.0, 2.5, 3.2, 3.5]])
    expected = torch.tensor([entropy(0.5, 0.25), entropy(0.25)])
    torch.testing.assert_close(histogram_entropy(x, 1.0, backend=backend), expected)


@BACKENDS
def test_closed_bins_by_hand(backend: str) -> None:
    """[0, 1), [1, 2), [2, 3), [3, 3.5]."""
    x = torch.tensor([[0.0, 0.5, 0.5, 1.5], [2.0, 2.5, 3.2, 3.5]])
    expected = torch.tensor([entropy(0.75, 0.25), entropy(0.5, 0.5)])
    torch.testing.assert_close(histogram_entropy(x, 1.0, compat=False, backend=backend), expected)


@BACKENDS
def test_closed_bins_include_the_maximum_on_the_last_edge(backend: str) -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 2.0]])
    expected = torch.tensor([entropy(0.25, 0.75)])  # [0, 1), [1, 2]
    torch.testing.assert_close(histogram_entropy(x, 1.0, compat=False, backend=backend), expected)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_uniform_row_has_the_log_of_its_bins(backend: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.arange(16) + 0.5, torch.tensor([0.0, 16.0])]).repeat(2, 1).to(dtype)
    expected = torch.full((2,), 16 / 18 * math.log(18))
    torch.testing.assert_close(histogram_entropy(x, 1.0, backend=backend), expected)


@BACKENDS
def test_not_finite_gives_nan_and_no_range_gives_zero(backend: str) -> None:
    for value in (math.nan, math.inf, -math.inf):
        x = torch.zeros(3, 4)
        x[1, 2] = value
        assert histogram_entropy(x, backend=backend).isnan().all()
    assert histogram_entropy(torch.ones(3, 4), backend=backend).tolist() == [0.0] * 3
    assert histogram_entropy(torch.tensor([[0.0, 0.05]]), backend=backend).tolist() == [0.0]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 300),
    step=st.sampled_from([0.1, 0.03, 0.7]),
    offset=st.sampled_from([0.0, 3.0, -1e3, 1e5]),
    grid=st.sampled_from([0, 10, 100]),
    seed=st.integers(0, 99),
)
def test_counts_what_a_loop_over_the_bins_counts(
    rows: int, columns: int, step: float, offset: float, grid: int, seed: int
) -> None:
    """Elements on a grid of tenths meet float32 edges; an offset makes bins a few floats wide."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x = ((x * grid).round() / grid if grid else x) + offset
    expected = bin_loop(x, step, True)
    for backend in ("cpp", "reference"):
        torch.testing.assert_close(histogram_entropy(x, step, backend=backend), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(step=st.floats(0.01, 10.0), seed=st.integers(0, 99), offset=st.sampled_from([0.0, -50.0]))
def test_closed_bins_agree_between_backends(step: float, seed: int, offset: float) -> None:
    x = torch.randn(7, 201, generator=torch.Generator().manual_seed(seed)) + offset
    by_backend = [histogram_entropy(x, step, compat=False, backend=name) for name in ("cpp", "reference")]
    torch.testing.assert_close(*by_backend, rtol=1e-5, atol=1e-6)


def test_order_within_a_row_does_not_matter() -> None:
    x = torch.randn(5, 400)
    assert torch.equal(histogram_entropy(x), histogram_entropy(x[:, torch.randperm(400)]))


def test_no_gradient() -> None:
    assert not histogram_entropy(torch.randn(3, 5, requires_grad=True)).requires_grad


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(lambda x: histogram_entropy(2 * x), fullgraph=True, backend="eager")
    x = torch.randn(4, 100)
    assert torch.equal(compiled(x), histogram_entropy(2 * x))


@BACKENDS
def test_too_many_bins(backend: str) -> None:
    with pytest.raises(
        ValueError, match=r"histogram_entropy: `step_size` expected at most 1048576 bins.*; standardise"
    ):
        histogram_entropy(torch.tensor([[0.0, 1e9]]), backend=backend)


@pytest.mark.parametrize(
    ("x", "step", "error", "text"),
    [
        (torch.zeros(3), 0.1, ValueError, r"`x` expected shape \[C, M\], got \[3\]"),
        (torch.zeros(3, 2).int(), 0.1, TypeError, "`x` expected float32"),
        ([[1.0]], 0.1, TypeError, "`x` expected a tensor"),
        (torch.zeros(3, 2), 0.0, ValueError, "`step_size` expected a finite number > 0, got 0.0"),
        (torch.zeros(3, 2), math.nan, ValueError, "`step_size`"),
    ],
)
def test_errors(x: Tensor, step: float, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"histogram_entropy: {text}"):
        histogram_entropy(x, step)


def test_float64_runs_on_the_reference_alone() -> None:
    assert histogram_entropy(torch.randn(2, 5).double()).dtype == torch.float64
    with pytest.raises(BackendUnavailableError, match="supports float32"):
        histogram_entropy(torch.randn(2, 5).double(), backend="cpp")
