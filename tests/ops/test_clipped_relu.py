"""clipped_relu: hand-computed values, gradients, memory order, what is saved, and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bdfast
from bdfast.backends import BackendUnavailableError
from bdfast.ops import channels as ch
from bdfast.ops import clipped_relu
from bdfast.testing import Case, parity, suites

BACKENDS = ["cpp", "reference"]
X = torch.tensor([[-1.0, 2.0, 0.0], [3.0, 5.0, 4.0]])  # [2, 3]
BOUND = torch.tensor([4.0, 4.0, 4.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    x, bound = X.clone().requires_grad_(), BOUND.clone().requires_grad_()
    y = clipped_relu(x, bound, backend=backend)
    assert y.tolist() == [[0.0, 2.0, 0.0], [3.0, 4.0, 4.0]]
    y.backward(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert x.grad is not None
    assert bound.grad is not None
    assert x.grad.tolist() == [[0.0, 2.0, 0.0], [4.0, 0.0, 6.0]]  # a tie goes to x
    assert bound.grad.tolist() == [0.0, 5.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", [torch.tensor(2.5), torch.tensor([2.5, 2.5, 2.5]), torch.full((3, 1, 1), 2.5), 2.5])
def test_forms_of_the_bound(backend: str, bound: Any) -> None:
    x = torch.randn(2, 3, 4, 4) * 3
    leaf = bound.requires_grad_() if isinstance(bound, Tensor) else None
    y = clipped_relu(x, bound, backend=backend)
    assert torch.equal(y, x.clamp(0.0, 2.5))
    if leaf is not None:
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        assert grad.shape == leaf.shape
        assert grad.sum() == (x > 2.5).sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_bound_is_relu(backend: str) -> None:
    x = torch.randn(4, 5, 6)
    for bound in (math.inf, torch.full((5,), math.inf)):
        assert torch.equal(clipped_relu(x, bound, backend=backend), x.relu())


def test_gradcheck_of_reference() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    for shape in ((), (4,), (4, 1)):
        bound = (torch.rand(shape, dtype=torch.float64) + 0.2).requires_grad_()
        assert torch.autograd.gradcheck(clipped_relu, (x, bound))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_goes_through_without_gradient(backend: str) -> None:
    x = torch.tensor([[math.nan, 1.0]], requires_grad=True)
    bound = torch.tensor([1.0, math.nan], requires_grad=True)
    y = clipped_relu(x, bound, backend=backend)
    assert y.isnan().all()
    y.backward(torch.full((1, 2), math.inf))
    assert x.grad is not None
    assert bound.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0]]
    assert bound.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_order_is_kept(backend: str) -> None:
    bound = torch.rand(5, requires_grad=True)
    plain = torch.randn(3, 5, 7, 6)
    results = []
    for x in (plain, plain.contiguous(memory_format=torch.channels_last), plain.transpose(2, 3).contiguous().mT):
        leaf = x.detach().requires_grad_()
        y = clipped_relu(leaf, bound, backend=backend)
        grads = torch.autograd.grad((y * plain).sum(), (leaf, bound))
        results.append((y.detach(), *grads))
        assert y.is_contiguous(memory_format=torch.channels_last) == ch.is_channels_last(x)
        assert grads[0].stride() == y.stride()
    for y, grad_x, grad_bound in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad_x, results[0][1])
        torch.testing.assert_close(grad_bound, results[0][2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("x_needs", "bound_needs", "planes"), [(True, False, 1), (False, True, 1), (True, True, 2)])
def test_saves_one_bit_an_element_and_gradient(backend: str, x_needs: bool, bound_needs: bool, planes: int) -> None:
    x = torch.randn(4, 8, 32, 32, requires_grad=x_needs)
    bound = torch.rand(8, requires_grad=bound_needs)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        clipped_relu(x, bound, backend=backend)
    assert sum(t.numel() * t.element_size() for t in saved) == planes * x.numel() // 8


def test_backends_agree_on_the_bits() -> None:
    """What one backend saved, another can start from: 5 channels of 7 x 31 end inside words and blocks."""
    from bdfast.ops.clipped_relu import FORWARD

    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 5, 7, 31).contiguous(memory_format=layout)
        bits = [FORWARD.call(x, torch.rand(5, generator=torch.Generator().manual_seed(0)), 0.0, True, True, backend)[1]
                for backend in BACKENDS]  # fmt: skip
        assert torch.equal(*bits)


def test_bits_by_hand() -> None:
    mask = torch.zeros(1, 1, 513, dtype=torch.bool)
    for element in (0, 17, 511, 512):
        mask[0, 0, element] = True
    bits = ch.pack(mask, channels_last=False)
    expected = torch.zeros(2, 16, dtype=torch.int32)
    expected[0, 0], expected[0, 1], expected[0, 15], expected[1, 0] = 1, 2, -(2**31), 1
    assert torch.equal(bits, expected)
    assert torch.equal(ch.unpack(bits, mask, channels_last=False), mask)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 23), min_size=2, max_size=4).map(tuple),
    layout=st.sampled_from(["contiguous", "channels_last", "transposed"]),
    needs=st.sampled_from(["both", "x", "bound", "none"]),
    bound=st.sampled_from(["channel", "scalar"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    name=st.sampled_from(["clipped_relu", "batch_norm_clipped_relu"]),
)
def test_any_shape(shape: tuple[int, ...], layout: str, needs: str, bound: str, dtype: torch.dtype, name: str) -> None:
    if layout == "channels_last" and len(shape) < 4:
        layout = "contiguous"
    options = {"shape": shape, "layout": layout, "needs": needs, "bound": bound}
    mismatches = parity(suites()[name], Case("drawn", "", options, conditioning=4.0), "auto", "cpu", dtype)
    assert not mismatches, "\n".join(map(str, mismatches))


def test_bounds_of_another_dtype_get_gradients_of_their_own() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        bound = torch.rand(3, dtype=dtype, requires_grad=True)
        y = clipped_relu(x, bound)
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        assert bound.grad is not None
        assert bound.grad.dtype == dtype


def test_without_grad_nothing_is_recorded() -> None:
    bound = torch.rand(3, requires_grad=True)
    with torch.no_grad():
        assert not clipped_relu(torch.randn(2, 3), bound).requires_grad
    assert not clipped_relu(torch.randn(2, 3), bound.detach()).requires_grad


def test_any_shape_has_room_for_one_bound() -> None:
    for shape in ((), (5,), (2, 3), (2, 3, 4, 5, 6, 7)):
        x = torch.randn(shape, requires_grad=True)
        bound = torch.tensor(0.5, requires_grad=True)
        y = clipped_relu(x, bound)
        y.sum().backward()
        assert torch.equal(y, x.clamp(0.0, 0.5))
        assert bound.grad == (x > 0.5).sum()


@pytest.mark.slow
@pytest.mark.parametrize("bound", [2.0, None])
def test_compiles_without_graph_break(bound: float | None) -> None:
    def f(x: Tensor, z: Tensor) -> Tensor:
        return clipped_relu(x * 2, z if bound is None else bound) + 1

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
        results = []
        for function in (f, compiled):
            leaves = x.detach().requires_grad_(), torch.ones(3, requires_grad=True)
            y = function(*leaves)
            y.square().sum().backward()
            results.append((y, *(leaf.grad for leaf in leaves)))
        for a, b in zip(*results, strict=True):
            assert a is None or torch.equal(a, b)
        assert (results[0][2] is None) == (bound is not None)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            (X.int(), 1.0),
            TypeError,
            "clipped_relu: `x` expected float32, float16, bfloat16 or float64, got torch.int32",
        ),
        (([1.0], 1.0), TypeError, r"`x` expected a tensor \[N, C, ...\], got list"),
        ((X, "6"), TypeError, "`bound` expected a number or a tensor, got str"),
        ((X, -1.0), ValueError, "`bound` expected a number >= 0, got -1.0"),
        ((X, math.nan), ValueError, "`bound` expected a number >= 0, got nan"),
        ((X, BOUND.int()), TypeError, "`bound` expected a floating-point tensor, got torch.int32"),
        ((X, BOUND[:2]), ValueError, r"`bound` expected .*\[3\] or \[3, 1, 1\], got shape \[2\] with x \[2, 3\]"),
        ((X, X), ValueError, r"`bound` expected .*got shape \[2, 3\]"),
        ((X[0], BOUND), ValueError, r"`bound` expected a number or a 0-dim tensor, got shape \[3\] with x \[3\]"),
        ((X, BOUND.to("meta")), ValueError, "`bound` expected the device of x, cpu, got meta; move it there"),
    ],
)
def test_errors_name_the_argument(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        clipped_relu(*arguments)


def test_named_backend_raises_its_reason() -> None:
    with pytest.raises(BackendUnavailableError, match="clipped_relu: backend 'cuda' cannot run"):
        clipped_relu(X, 1.0, backend="cuda")
    with pytest.raises(BackendUnavailableError, match="supports float32, float16, bfloat16, got float64"):
        clipped_relu(X.double(), 1.0, backend="cpp")
    with bdfast.backend("reference"):
        assert torch.equal(clipped_relu(X, 1.0), X.clamp(0, 1))
