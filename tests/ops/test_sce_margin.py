"""sce_margin: hand-computed values, its order beside that of symmetric cross entropy, edges and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdfast.backends import BackendUnavailableError
from bdfast.errors import LabelRangeError
from bdfast.ops import sce_margin
from bdfast.testing import Case, parity, suites
from bdfast.testing.ops.sce_margin import usual

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [1.0, 5.0, 5.0]])
TARGET = torch.tensor([0, 0])
BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])


@BACKENDS
def test_by_hand(backend: str) -> None:
    expected = torch.tensor([math.log(2) - 2, 5 + math.log(2) - 1])
    torch.testing.assert_close(sce_margin(LOGITS, TARGET, backend=backend), expected)
    torch.testing.assert_close(
        sce_margin(LOGITS, torch.tensor([1, 2]), backend=backend)[0], (LOGITS[0, 0].exp() + 1).log()
    )


@BACKENDS
@pytest.mark.parametrize("classes", [3, 40])
def test_rows_that_are_not_finite_come_last(backend: str, classes: int) -> None:
    logits = torch.randn(6, classes)
    target = torch.zeros(6, dtype=torch.int64)
    logits[1, 2] = torch.nan
    logits[2, 1] = torch.inf
    logits[3, 2] = -torch.inf
    logits[4, 0] = torch.inf  # also where the label would be certain
    logits[5, 0] = -torch.inf
    margin = sce_margin(logits, target, backend=backend)
    assert margin[0].isfinite()
    assert margin[1:].tolist() == [math.inf] * 5


@BACKENDS
@pytest.mark.parametrize("classes", [65, 128, 1001])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_class_anywhere_that_is_not_finite(value: float, classes: int, backend: str) -> None:
    """Left of the label, right of it and the label itself; in whole vectors and in what is left of a row."""
    logits = torch.randn(classes, classes, generator=torch.Generator().manual_seed(0))
    logits.fill_diagonal_(value)
    for place in (0, classes // 2, classes - 1):
        margin = sce_margin(logits, torch.full((classes,), place), backend=backend)
        assert margin.tolist() == [math.inf] * classes


@BACKENDS
def test_single_class_has_nothing_beside_it(backend: str) -> None:
    margin = sce_margin(torch.tensor([[1.0], [torch.nan]]), torch.tensor([0, 0]), backend=backend)
    assert margin.tolist() == [-math.inf, math.inf]


@BACKENDS
@pytest.mark.parametrize("label", [0, 1, 31, 32, 33, 47, 48, 49])
def test_any_label_of_a_row_is_left_out(backend: str, label: int) -> None:
    """Rows end inside a vector, at its end and one past it; the label is anywhere."""
    for classes in (label + 1, label + 2, 50):
        logits = torch.zeros(17, classes)
        logits[:, label] = 80.0  # would hide the others, were it in the sum
        margin = sce_margin(logits, torch.full((17,), label), backend=backend)
        expected = math.log(classes - 1) - 80.0 if classes > 1 else -math.inf
        torch.testing.assert_close(margin, torch.full((17,), expected))


@BACKENDS
def test_confident_rows_tie_in_float32_sce_and_not_here(backend: str) -> None:
    """400 rows, each a little more confident than the one before."""
    n = 400
    logits = torch.zeros(n, 10)
    target = torch.arange(n) % 10
    logits[torch.arange(n), target] = 20.0 + 0.01 * torch.arange(n)
    assert len(usual(logits, target).unique()) < 10
    margin = sce_margin(logits, target, backend=backend)
    assert torch.equal(margin.argsort(stable=True), torch.arange(n).flip(0))
    assert len(margin.unique()) == n


@BACKENDS
def test_rows_do_not_see_each_other(backend: str) -> None:
    """A permutation of the samples permutes the keys, bit for bit, whichever vector or tail a row falls in."""
    logits, target = torch.randn(64, 10) * 5, torch.randint(10, (64,))
    order = torch.randperm(64)
    assert torch.equal(
        sce_margin(logits, target, backend=backend)[order], sce_margin(logits[order], target[order], backend=backend)
    )


def test_is_not_differentiable() -> None:
    assert not sce_margin(LOGITS.clone().requires_grad_(), TARGET).requires_grad


def test_float64_stays_float64() -> None:
    assert sce_margin(LOGITS.double(), TARGET).dtype == torch.float64
    assert sce_margin(LOGITS.half(), TARGET).dtype == torch.float32


def test_compiles_without_graph_break() -> None:
    compiled = torch.compile(lambda z, y: sce_margin(z * 2, y) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(LOGITS, TARGET), sce_margin(LOGITS * 2, TARGET) + 1)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    classes=st.integers(2, 40),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    alpha=st.sampled_from([0.01, 1.0, 6.0]),
    beta=st.sampled_from([0.01, 1.0, 4.0]),
    seed=st.integers(0, 1000),
)
def test_orders_as_float64_sce_for_any_weights(
    rows: int, classes: int, scale: float, alpha: float, beta: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator) * scale
    target = torch.randint(classes, (rows,), generator=generator)
    z = logits.double()
    margin = sce_margin(z, target, backend="reference")
    # log1p and sigmoid in float64 tell rows apart whose margins differ by more than these roundings.
    ce, doubt = torch.log1p(margin.exp()), margin.sigmoid()
    sce = alpha * ce + beta * 4.0 * doubt
    got = sce_margin(logits, target)
    for i in range(rows - 1):
        tolerance = 1e-5 * (1 + got[i].abs() + got[i + 1 :].abs())
        above = got[i] > got[i + 1 :] + tolerance
        assert bool((sce[i] >= sce[i + 1 :])[above].all())


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 80),
    classes=st.integers(1, 70),
    scale=st.sampled_from([0.0, 0.1, 10.0, 300.0]),
    special=st.sampled_from(["", "confident", "-inf"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_shape(rows: int, classes: int, scale: float, special: str, dtype: torch.dtype) -> None:
    options = {"shape": (rows, classes), "scale": scale, "special": special}
    assert not parity(suites()["sce_margin"], Case("drawn", "", options), "auto", "cpu", dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((LOGITS[0], TARGET), ValueError, r"sce_margin: `logits` expected shape \[N, C\]"),
        ((LOGITS[:, :0], TARGET), ValueError, "C >= 1"),
        ((LOGITS.int(), TARGET), TypeError, "`logits` expected float32"),
        ((LOGITS.to_sparse(), TARGET), TypeError, r"`logits` expected a dense tensor, got torch.sparse_coo; convert"),
        ((LOGITS, TARGET.int()), TypeError, r"convert it with .long\(\)"),
        ((LOGITS, TARGET[:1]), ValueError, r"`target` expected one label a row of logits, \[2\], got \[1\]"),
    ],
)
def test_errors_name_the_argument(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        sce_margin(*arguments)


@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_label_out_of_range(backend: str, label: int) -> None:
    with pytest.raises(LabelRangeError, match=rf"sce_margin: .* labels in \[0, 3\), got {label} at index 1"):
        sce_margin(LOGITS, torch.tensor([0, label]), backend=backend)


def test_named_backend_raises_its_reason() -> None:
    with pytest.raises(BackendUnavailableError, match=r"sce_margin: backend 'cpp' cannot run: .* got float64"):
        sce_margin(LOGITS.double(), TARGET, backend="cpp")
