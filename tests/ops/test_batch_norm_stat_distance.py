"""batch_norm_stat_distance: hand-computed values, gradients, edges and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bdfast.ops import batch_norm_stat_distance

BACKENDS = ["cpp", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """Channel 0 holds 1, 3 (mean 2, variance 1), channel 1 holds 5, 5 (mean 5, variance 0)."""
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]], requires_grad=True)
    distance = batch_norm_stat_distance(x, torch.tensor([0.0, 4.0]), torch.tensor([4.0, 2.0]), backend=backend)
    assert distance.dtype == torch.float32
    assert distance.item() == 4 + 9 + 1 + 4
    distance.backward()
    # dx = (mean - rm) + 2 (var - rv)(x - mean), as M = 2
    assert x.grad is not None
    assert x.grad.tolist() == [[2 + 6, 1], [2 - 6, 1]]


def test_same_statistics_as_batch_norm() -> None:
    """With momentum 1, a batch norm takes over the batch's statistics (the variance unbiased)."""
    x = torch.randn(8, 3, 5, 5) * 2 + 1
    bn = torch.nn.BatchNorm2d(3, momentum=1.0)
    bn(x)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    count = 8 * 25
    assert batch_norm_stat_distance(x, bn.running_mean, bn.running_var * (count - 1) / count) < 1e-10


def test_gradcheck_of_the_reference() -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: batch_norm_stat_distance(t, mean, var), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_is_nan(backend: str) -> None:
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    distance = batch_norm_stat_distance(x, torch.zeros(3), torch.ones(3), backend=backend)
    assert math.isnan(distance.item())
    distance.backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_keeps_the_memory_order(backend: str) -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    batch_norm_stat_distance(x, torch.zeros(3), torch.ones(3), backend=backend).backward()
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_compiles_without_graph_break() -> None:
    def term(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return batch_norm_stat_distance(x * 2, mean, var) * 3

    x, mean, var = torch.randn(4, 3, 5, 5), torch.randn(3), torch.rand(3)
    grads = []
    for function in (term, torch.compile(term, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        function(leaf, mean, var).backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])


X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([1.0], torch.zeros(3), torch.ones(3)), TypeError, r"`x` expected a tensor \[N, C, ...\], got list"),
        ((X[0, 0], torch.zeros(3), torch.ones(3)), ValueError, r"`x` expected shape \[N, C, ...\] with C >= 1"),
        ((X, None, torch.ones(3)), TypeError, r"`running_mean` expected a tensor \[3\], got NoneType"),
        ((X, torch.zeros(3), torch.ones(2)), ValueError, r"`running_var` expected one value a channel, \[3\], got"),
        ((X, torch.zeros(3).int(), torch.ones(3)), TypeError, "`running_mean` expected a floating-point tensor"),
        ((X, torch.zeros(3), torch.ones(3, device="meta")), ValueError, "`running_var` expected the device of x, cpu"),
        (
            (X, torch.zeros(3, requires_grad=True), torch.ones(3)),
            ValueError,
            "`running_mean` expected no gradient to be asked for",
        ),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="batch_norm_stat_distance: " + text):
        batch_norm_stat_distance(*arguments)
