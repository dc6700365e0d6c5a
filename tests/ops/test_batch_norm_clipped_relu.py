"""batch_norm_clipped_relu: hand-computed values, agreement with the chain it replaces, and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.ops import batch_norm_clipped_relu

BACKENDS = ["cpp", "reference"]
X = torch.tensor([[1.0, 2.0], [3.0, 9.0]])
MEAN, VAR = torch.tensor([1.0, 1.0]), torch.tensor([4.0, 4.0])
WEIGHT, BIAS = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """t = (x - 1) / 2 * w + b = [[0.5, 2.5], [2.5, -1]]."""
    x, bound = X.clone().requires_grad_(), torch.tensor([2.0, 3.0], requires_grad=True)
    y = batch_norm_clipped_relu(x, MEAN, VAR, WEIGHT, BIAS, bound, 0.0, backend=backend)
    torch.testing.assert_close(y, torch.tensor([[0.5, 2.5], [2.0, 0.0]]))
    y.backward(torch.tensor([[1.0, 2.0], [4.0, 8.0]]))
    assert x.grad is not None
    assert bound.grad is not None
    assert x.grad.tolist() == [[1.0, -1.0], [0.0, 0.0]]
    assert bound.grad.tolist() == [4.0, 0.0]


def drawn(shape: tuple[int, ...] = (4, 6, 5, 5)) -> dict[str, Any]:
    c = shape[1]
    return {
        "x": torch.randn(shape),
        "running_mean": torch.randn(c),
        "running_var": torch.rand(c) + 0.5,
        "weight": torch.randn(c),
        "bias": torch.randn(c),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("without", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_is_batch_norm_relu_minimum(backend: str, without: tuple[str, ...]) -> None:
    arguments = drawn() | dict.fromkeys(without)
    z = torch.rand(6)
    usual = F.relu(F.batch_norm(*arguments.values(), eps=1e-3))
    torch.testing.assert_close(batch_norm_clipped_relu(**arguments, eps=1e-3, backend=backend), usual)
    torch.testing.assert_close(
        batch_norm_clipped_relu(**arguments, bound=z, eps=1e-3, backend=backend), torch.minimum(usual, z[:, None, None])
    )
    torch.testing.assert_close(
        batch_norm_clipped_relu(**arguments, bound=0.7, eps=1e-3, backend=backend), usual.clamp(max=0.7)
    )


def test_gradcheck_of_reference() -> None:
    arguments = {name: value.double() for name, value in drawn((3, 4, 5)).items()}
    x = arguments.pop("x").requires_grad_()
    bound = (torch.rand(4, dtype=torch.float64) + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, z: batch_norm_clipped_relu(x, **arguments, bound=z), (x, bound))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_twice_as_much_as_pytorch(dtype: torch.dtype) -> None:
    arguments = drawn((8, 6, 9, 9))
    arguments["x"] = arguments["x"].to(dtype)
    z = torch.rand(6) + 0.5

    def usual(to: torch.dtype) -> Tensor:
        values = (value.to(to) for value in arguments.values())
        return torch.minimum(F.relu(F.batch_norm(*values)), z.to(to)[:, None, None]).double()

    exact = usual(torch.float64)
    error = (batch_norm_clipped_relu(**arguments, bound=z).double() - exact).abs().max()
    assert error <= 2 * (usual(dtype) - exact).abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_in_half_precision(backend: str) -> None:
    arguments = {name: value.bfloat16() for name, value in drawn().items()}
    y = batch_norm_clipped_relu(**arguments, backend=backend)
    exact = batch_norm_clipped_relu(**{name: value.double() for name, value in arguments.items()})
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


def test_parameters_that_require_grad_are_refused_while_autograd_records() -> None:
    for name in ("running_mean", "running_var", "weight", "bias"):
        arguments = drawn()
        arguments[name].requires_grad_()
        text = f"batch_norm_clipped_relu: `{name}` expected a tensor that does not require grad, .*; freeze it with"
        with pytest.raises(ValueError, match=text):
            batch_norm_clipped_relu(**arguments)
        with torch.no_grad():
            assert not batch_norm_clipped_relu(**arguments).requires_grad


@pytest.mark.slow
def test_compiles_without_graph_break() -> None:
    arguments = drawn()
    x = arguments.pop("x")

    def f(x: Tensor, z: Tensor) -> Tensor:
        return batch_norm_clipped_relu(x * 2, **arguments, bound=z) + 1

    results = []
    for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = x.detach().requires_grad_(), torch.ones(6, requires_grad=True)
        y = function(*leaves)
        y.square().sum().backward()
        results.append((y, leaves[0].grad, leaves[1].grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": X.int()}, TypeError, "batch_norm_clipped_relu: `x` expected float32"),
        ({"x": X[0]}, ValueError, r"`x` expected shape \[N, C, ...\], got \[2\]; add a batch dimension"),
        ({"running_mean": None}, TypeError, r"`running_mean` expected a tensor \[2\], got NoneType"),
        ({"running_var": VAR[:1]}, ValueError, r"`running_var` expected one value a channel, \[2\], got shape \[1\]"),
        ({"weight": WEIGHT.int()}, TypeError, "`weight` expected a floating-point tensor, got torch.int32"),
        ({"bias": BIAS[:, None]}, ValueError, r"`bias` expected one value a channel, \[2\]"),
        ({"bias": BIAS.to("meta")}, ValueError, "`bias` expected the device of x, cpu, got meta"),
        ({"bound": torch.ones(3)}, ValueError, "batch_norm_clipped_relu: `bound` expected"),
        ({"bound": -2}, ValueError, "`bound` expected a number >= 0, got -2"),
        ({"eps": -1e-5}, ValueError, "`eps` expected a finite number >= 0, got -1e-05"),
        ({"eps": math.nan}, ValueError, "`eps`"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {
        "x": X, "running_mean": MEAN, "running_var": VAR, "weight": WEIGHT, "bias": BIAS,
    }  # fmt: skip
    with pytest.raises(error, match=text):
        batch_norm_clipped_relu(**arguments | change)
