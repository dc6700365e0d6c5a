"""batch_norm_relu: hand-computed values, agreement with the chain it replaces, gradients, edges and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.backends.availability import runs_triton
from bdfast.ops import batch_norm_relu

_NO_TRITON = runs_triton(torch.empty(0))
TRITON = pytest.param("triton", marks=pytest.mark.skipif(bool(_NO_TRITON), reason=str(_NO_TRITON)))
BACKENDS = ["cpp", "reference", TRITON]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """Channel 0 holds 1, 3 (mean 2, variance 1), channel 1 holds 5, 5 (mean 5, variance 0)."""
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    weight, bias = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.25])
    residual = torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    y, mean, var = batch_norm_relu(x, weight, bias, residual, eps=0.0625, backend=backend)
    factor = 2.0 / 1.0625**0.5
    torch.testing.assert_close(y, torch.tensor([[4.0 - factor, 0.25], [1.0 + factor, 0.0]]))
    assert mean.tolist() == [2.0, 5.0]
    assert var.tolist() == [1.0, 0.0]


def leaves(dtype: torch.dtype = torch.float32, *, shape: tuple[int, ...] = (6, 5, 3, 7)) -> list[Tensor]:
    """x, weight, bias and residual."""
    x, residual = (torch.randn(shape).to(dtype) for _ in range(2))
    channels = shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.randn(channels, dtype=wide), torch.randn(channels, dtype=wide)
    return [t.requires_grad_() for t in (x * 2 + 1, weight, bias, residual) if not t.requires_grad]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_as_the_chain_that_it_replaces(backend: str, with_residual: bool, relu: bool) -> None:
    x, weight, bias, residual = (t.detach().requires_grad_() for t in leaves())
    norm = torch.nn.BatchNorm2d(5, eps=1e-3, momentum=0.3)
    norm.weight.data, norm.bias.data = weight.detach().clone(), bias.detach().clone()
    mean, var = torch.zeros(5), torch.ones(5)
    y = batch_norm_relu(
        x, weight, bias, residual if with_residual else None, running_mean=mean, running_var=var, momentum=0.3,
        eps=1e-3, relu=relu, backend=backend,
    ).y  # fmt: skip
    other_x, other_residual = (t.detach().clone().requires_grad_() for t in (x, residual))
    expected = norm(other_x) + other_residual if with_residual else norm(other_x)
    expected = F.relu(expected) if relu else expected
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(var, norm.running_var)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    pairs = [(x, other_x), (weight, norm.weight), (bias, norm.bias)]
    for ours, usual in [*pairs, *([(residual, other_residual)] if with_residual else [])]:
        torch.testing.assert_close(ours.grad, usual.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_gradcheck_of_the_reference(with_residual: bool, relu: bool) -> None:
    inputs = leaves(torch.float64, shape=(4, 2, 3))
    inputs = [t.detach().requires_grad_() for t in inputs][: 4 if with_residual else 3]
    assert torch.autograd.gradcheck(lambda *t: batch_norm_relu(*t, relu=relu).y, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mask_is_that_of_the_rounded_output(dtype: torch.dtype, backend: str) -> None:
    """Many values lie around 0, where a mask found anew must be the one that was used."""
    x = (torch.randn(64, 3, 8, 8) * 1e-4).to(dtype).requires_grad_()
    ones, zeros = torch.ones(3), torch.zeros(3)
    y, _, _ = batch_norm_relu(x, ones, zeros, eps=1.0, backend=backend)
    bias = torch.zeros(3, requires_grad=True)
    batch_norm_relu(x, ones, bias, eps=1.0, backend=backend).y.backward(torch.ones_like(y))
    assert bias.grad is not None
    assert torch.equal(bias.grad, (y > 0).sum(dim=(0, 2, 3)).float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_everything_keeps_the_memory_order_of_x(channels_last: bool, backend: str) -> None:
    x, weight, bias, residual = (t.detach() for t in leaves())
    order = torch.channels_last if channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=order).requires_grad_()
    residual.requires_grad_()
    y, mean, var = batch_norm_relu(x, weight, bias, residual, backend=backend)
    assert not mean.requires_grad
    assert not var.requires_grad
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    for tensor in (y, x.grad):
        assert tensor.is_contiguous(memory_format=order)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend: str) -> None:
    x, running = torch.zeros(0, 3, 4, 4, requires_grad=True), torch.ones(2, 3)
    weight = torch.ones(3, requires_grad=True)
    y, mean, var = batch_norm_relu(
        x, weight, torch.zeros(3), running_mean=running[0], running_var=running[1], backend=backend
    )
    assert y.shape == x.shape
    assert torch.cat((mean, var)).isnan().all()
    assert torch.equal(running, torch.ones(2, 3))
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0] * 3


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 1, 0, 0), (2, 1, 2, 6)], ids=["of-the-pivot", "elsewhere"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_not_finite_takes_its_channel_alone(
    channels_last: bool, place: tuple[int, ...], special: float
) -> None:
    results = []
    for backend in ("reference", "cpp"):
        torch.manual_seed(0)
        x, weight, bias, residual = (t.detach() for t in leaves())
        x[place] = special
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
        y, mean, var = batch_norm_relu(*inputs, backend=backend)
        y.backward(torch.ones_like(y))
        results.append([y, mean, var, *(t.grad for t in inputs)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert results[1][0].isnan().sum() == x[:, 1].numel()


# Planes: one run and a part of one, several runs, one channel; columns: joined rows, and more than a chunk is wide.
SHAPES = [(5, 7, 31, 33), (3, 5, 90, 91), (2, 1, 150, 150), (700, 3, 2, 2), (70, 300, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_neither_threads_nor_the_way_through_memory_change_a_bit(shape: tuple[int, ...], channels_last: bool) -> None:
    """With more threads than channels the two passes of a channel no longer follow each other."""
    x, weight, bias, residual = (t.detach() for t in leaves(shape=shape))
    order = torch.channels_last if channels_last else torch.contiguous_format
    x, residual = (t.contiguous(memory_format=order) for t in (x, residual))
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            inputs = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
            y, mean, var = batch_norm_relu(*inputs, backend="cpp")
            y.backward(residual)
            found.append([y, mean, var, *(t.grad for t in inputs)])
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)
    torch.testing.assert_close(found[0][0], F.relu(F.batch_norm(x, None, None, weight, bias, True) + residual))


@pytest.mark.parametrize("shape", [(16, 128, 64, 64), (3, 32, 301, 299)], ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
def test_outputs_that_go_past_the_caches(with_residual: bool, shape: tuple[int, ...]) -> None:
    """Whole lines, and planes that begin anywhere in one."""
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight, bias = (torch.rand(shape[1], requires_grad=True) for _ in range(2))
    inputs = (x, weight, bias, residual) if with_residual else (x, weight, bias)
    y = batch_norm_relu(*inputs, backend="cpp").y
    exact = [t.detach().double().requires_grad_() for t in inputs]
    normed = F.batch_norm(exact[0], None, None, exact[1], exact[2], True)
    expected = F.relu(normed + exact[3] if with_residual else normed)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=5e-6)
    grad = torch.where(y.detach() < 1e-5, 0.0, x.detach())  # no gradient where a rounding decides
    found, wanted = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, exact, grad.double())
    for got, usual in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), usual, rtol=1e-5, atol=1e-6 * float(usual.abs().max()))


def test_a_changed_running_statistic_is_news_to_autograd() -> None:
    running = [torch.zeros(5), torch.ones(5)]
    versions = [t._version for t in running]
    batch_norm_relu(*(t.detach() for t in leaves()), running_mean=running[0], running_var=running[1])
    assert all(t._version > before for t, before in zip(running, versions, strict=True))


@pytest.mark.slow
def test_compiles_without_graph_break() -> None:
    def chain(*tensors: Tensor) -> Tensor:
        return batch_norm_relu(*tensors).y * 3

    grads = []
    inputs = [t.detach() for t in leaves()]
    for function in (chain, torch.compile(chain, fullgraph=True, backend="aot_eager")):
        fresh = [t.clone().requires_grad_() for t in inputs]
        function(*fresh).sum().backward()
        grads.append([t.grad for t in fresh])
    for plain, compiled in zip(*grads, strict=True):
        assert torch.equal(plain, compiled)  # type: ignore[arg-type]


X, ONES = torch.randn(2, 3, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, r"`x` expected a tensor \[N, C, ...\], got list"),
        ({"x": X[0, 0]}, ValueError, r"`x` expected shape \[N, C, ...\] with C >= 1"),
        ({"weight": None}, TypeError, r"`weight` expected a tensor \[3\], got NoneType"),
        ({"bias": torch.ones(2)}, ValueError, r"`bias` expected one value a channel, \[3\], got"),
        ({"bias": ONES.int()}, TypeError, "`bias` expected a floating-point tensor"),
        ({"residual": 1.0}, TypeError, "`residual` expected a tensor or None, got float"),
        ({"residual": X.half()}, TypeError, "`residual` expected the dtype of x, torch.float32"),
        ({"residual": X[:1]}, ValueError, r"`residual` expected the shape of x, torch.Size\(\[2, 3, 4\]\)"),
        ({"running_mean": ONES}, ValueError, "`running_var` expected a tensor beside `running_mean`, got None"),
        ({"running_mean": ONES.double(), "running_var": ONES}, ValueError, "`running_mean` expected a contiguous"),
        ({"eps": -1.0}, ValueError, "`eps` expected a finite number >= 0"),
        ({"momentum": 1.5}, ValueError, r"`momentum` expected a number in \[0, 1\]"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, "`weight` expected the device of x, cpu"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"x": X, "weight": ONES, "bias": ONES}
    with pytest.raises(error, match="batch_norm_relu: " + text):
        batch_norm_relu(**arguments | change)
