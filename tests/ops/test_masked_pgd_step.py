"""masked_pgd_step_: hand-computed values, the patch, the ball, layouts, edges and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdfast.ops import masked_pgd_step_
from bdfast.testing import suites
from bdfast.testing.ops.clipped_relu import arrange

BACKENDS = ["cpp", "reference"]
SUITE = suites()["masked_pgd_step_"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """A corner patch of a 3 x 4 image: steps up, down and none; the ball and both bounds cut."""
    x = torch.tensor([[[[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5]]]])
    x_adv = x.clone()
    x_adv[0, 0, 0, 2] = 0.625
    grad = torch.tensor([[[[1.0, 1.0, 1.0, -1.0], [1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]]])
    out = masked_pgd_step_(x_adv, x, grad, torch.tensor([[0, 3]]), 1, step_size=0.25, eps=0.1875, backend=backend)
    assert out is x_adv
    expected = [[0.5, 0.5, 0.6875, 0.3125], [0.5, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5]]
    assert x_adv[0, 0].tolist() == expected


def by_pixel(
    x_adv: Tensor, x: Tensor, grad: Tensor, centers: Tensor, radius: int, step: list[float], eps: list[float]
) -> Tensor:
    """The definition, pixel by pixel, in Python's float64."""
    out = x_adv.double().clone()
    samples, channels, height, width = x.shape
    for n in range(samples):
        for h in range(height):
            for w in range(width):
                if max(abs(h - int(centers[n, 0])), abs(w - int(centers[n, 1]))) > radius:
                    continue
                for c in range(channels):
                    g, x0 = float(grad[n, c, h, w]), float(x[n, c, h, w])
                    v = float(x_adv[n, c, h, w]) + step[c] * ((g > 0) - (g < 0))
                    out[n, c, h, w] = min(max(min(max(v, x0 - eps[c]), x0 + eps[c]), 0.0), 1.0)
    return out


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 20)),
    radius=st.integers(0, 12),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "channels_last", "sliced"])] * 3),
    data=st.data(),
)
def test_definition(shape: tuple[int, int, int, int], radius: int, layouts: tuple[str, ...], data: Any) -> None:
    n, c, height, width = shape
    side = st.integers(-radius - 2, max(height, width) + radius + 2)
    centers = torch.tensor(data.draw(st.lists(st.tuples(side, side), min_size=n, max_size=n)), dtype=torch.int32)
    centers = centers.reshape(n, 2)
    step, eps = [0.05 * (i + 1) for i in range(c)], [0.03 * (i + 1) for i in range(c)]
    x, grad = torch.rand(shape), torch.randn(shape).round()
    x_adv = (x + 0.02 * torch.randn(shape)).clamp(0, 1)
    expected = by_pixel(x_adv, x, grad, centers, radius, step, eps)
    a, b, g = (arrange(t.clone(), layout) for t, layout in zip((x_adv, x, grad), layouts, strict=True))
    options = {"step_size": torch.tensor(step), "eps": torch.tensor(eps)}
    for backend in BACKENDS:
        got = masked_pgd_step_(a.clone(), b, g, centers, radius, **options, backend=backend)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("case", [c for c in SUITE.cases if not c.large], ids=lambda c: c.name)
def test_backends_agree_to_the_bit_and_leave_the_rest_alone(case: Any) -> None:
    for dtype in case.dtypes:
        got, expected = SUITE.inputs(case, "cpu", dtype), SUITE.inputs(case, "cpu", dtype)
        before = got["x_adv"].clone()
        masked_pgd_step_(**got, backend="cpp")
        masked_pgd_step_(**expected, backend="reference")
        assert torch.equal(got["x_adv"].nan_to_num(nan=9.0), expected["x_adv"].nan_to_num(nan=9.0))
        outside = ~inside(before, got["centers"], case.options["radius"])
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(got["x_adv"][outside].view(bits), before[outside].view(bits))  # of NaN too


def inside(x: Tensor, centers: Tensor, radius: int | None) -> Tensor:
    """Which elements are in their image's patch, by hand."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for n, (row, column) in enumerate(centers.tolist()):
        reach = 2**64 if radius is None else radius
        rows, columns = (slice(max(0, c - reach), max(0, c + reach + 1)) for c in (row, column))
        mask[n, :, rows, columns] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_any_integer_dtype_of_centers(dtype: torch.dtype) -> None:
    x = torch.full((2, 1, 4, 4), 0.5)
    centers = torch.tensor([[0, 3], [2, 2]], dtype=dtype)
    out = masked_pgd_step_(x.clone(), x, torch.ones_like(x), centers, 0, step_size=0.25, eps=1.0)
    assert (out != x).nonzero().tolist() == [[0, 0, 0, 3], [1, 0, 2, 2]]


def test_strided_centers() -> None:
    x = torch.full((2, 1, 4, 4), 0.5)
    centers = torch.tensor([[0, 2], [3, 2]]).t()  # rows 0, 2; columns 3, 2
    out = masked_pgd_step_(x.clone(), x, torch.ones_like(x), centers, 0, step_size=0.25, eps=1.0)
    assert (out != x).nonzero().tolist() == [[0, 0, 0, 3], [1, 0, 2, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity(backend: str) -> None:
    """sign(NaN) = 0, but the projection is applied; NaN images are NaN; a NaN bound is NaN."""
    x = torch.tensor([[0.5, math.nan, 0.5, math.inf, -math.inf, 3.0]]).reshape(1, 1, 1, 6)
    x_adv = torch.tensor([[0.9, 0.5, math.nan, 0.5, 0.5, 0.5]]).reshape(1, 1, 1, 6)
    grad = torch.tensor([[math.nan, 1.0, 1.0, math.inf, -math.inf, 1.0]]).reshape(1, 1, 1, 6)
    out = masked_pgd_step_(x_adv, x, grad, None, None, step_size=0.125, eps=0.25, backend=backend)
    assert [round(v, 6) for v in out.flatten().tolist() if v == v] == [0.75, 1.0, 0.0, 1.0]
    assert out.isnan().flatten().tolist() == [False, True, True, False, False, False]
    bounds = {"eps": 0.25, "step_size": 0.125, "lower": 0.0, "upper": 1.0}
    for name in bounds:
        spoiled = bounds | {name: torch.tensor([math.nan])}
        x = torch.full((1, 1, 1, 3), 0.5)
        assert masked_pgd_step_(x.clone(), x, torch.ones_like(x), None, None, **spoiled, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_zero_is_a_projection_and_idempotent(backend: str) -> None:
    x = torch.rand(3, 3, 8, 8)
    x_adv = x + torch.randn_like(x)
    masked_pgd_step_(x_adv, x, torch.randn_like(x), None, None, step_size=0.0, eps=0.1, backend=backend)
    assert ((x_adv >= 0) & (x_adv <= 1) & (x_adv >= x - 0.1) & (x_adv <= x + 0.1)).all()
    once = x_adv.clone()
    masked_pgd_step_(x_adv, x, torch.randn_like(x), None, None, step_size=0.0, eps=0.1, backend=backend)
    assert torch.equal(x_adv, once)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_and_channels_of_one_value_are_the_same(backend: str) -> None:
    x = torch.rand(3, 2, 8, 8)
    start, grad = x + 0.05 * torch.randn_like(x), torch.randn_like(x)
    expected = masked_pgd_step_(start.clone(), x, grad, None, None, step_size=0.01, eps=0.03, backend=backend)
    for view in ((), (2,), (2, 1, 1)):
        step, eps = torch.full(view, 0.01), torch.full(view, 0.03)
        got = masked_pgd_step_(start.clone(), x, grad, None, None, step_size=step, eps=eps, backend=backend)
        assert torch.equal(got, expected)


def test_float64_runs_on_the_reference() -> None:
    x = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    out = masked_pgd_step_(x.clone(), x, torch.ones_like(x), None, None, step_size=1e-12, eps=1.0)
    assert out.item() == 0.5 + 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_through_the_old_images_raises(backend: str) -> None:
    x, scale = torch.rand(1, 1, 4, 4), torch.ones((), requires_grad=True)
    x_adv = x.clone()
    product = (scale * x_adv).sum()
    masked_pgd_step_(x_adv, x, torch.ones_like(x), None, None, step_size=0.1, eps=0.1, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_steps_an_image_that_requires_grad_as_pgd_loops_have_it() -> None:
    x = torch.rand(2, 3, 6, 6)
    x_adv = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((x_adv**2).sum(), x_adv)
    masked_pgd_step_(x_adv, x, gradient, None, None, step_size=0.1, eps=0.2)
    assert x_adv.requires_grad
    assert x_adv.is_leaf
    assert torch.equal(x_adv.detach(), (x + 0.1 * (x > 0)).clamp(0, 1))


def test_inference_tensors() -> None:
    with torch.inference_mode():
        x = torch.full((1, 1, 2, 2), 0.5)
        assert (masked_pgd_step_(x.clone(), x, torch.ones_like(x), None, None, step_size=0.1, eps=0.2) > x).all()


@pytest.mark.slow
def test_compiles_without_graph_break() -> None:
    def step(x_adv: Tensor, x: Tensor, grad: Tensor, centers: Tensor) -> Tensor:
        return masked_pgd_step_(x_adv, x, grad, centers, 2, step_size=0.1, eps=0.2, upper=torch.ones(3)) * 2

    x, grad, centers = torch.rand(2, 3, 6, 6), torch.randn(2, 3, 6, 6), torch.tensor([[0, 0], [3, 5]])
    plain, compiled = x.clone(), x.clone()
    expected = step(plain, x, grad, centers)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, x, grad, centers)
    assert torch.equal(got, expected)
    assert torch.equal(compiled, plain)


X = torch.rand(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x_adv": [1.0]}, TypeError, r"`x_adv` expected a tensor \[N, C, H, W\], got list"),
        ({"x_adv": X.byte()}, TypeError, "`x_adv` expected float32, float16, bfloat16 or float64, got torch.uint8"),
        ({"x_adv": X[0]}, ValueError, r"`x_adv` expected shape \[N, C, H, W\], got \[3, 4, 5\]"),
        ({"x": X[:1]}, ValueError, r"`x` expected the shape of x_adv, \[2, 3, 4, 5\], got \[1, 3, 4, 5\]"),
        ({"grad": X.half()}, TypeError, "`grad` expected torch.float32 like x_adv, got torch.float16"),
        ({"grad": None}, TypeError, r"`grad` expected a tensor \[N, C, H, W\], got NoneType"),
        ({"grad": X.to("meta")}, ValueError, "`grad` expected the device of x_adv, cpu, got meta"),
        ({"x_adv": X, "x": X}, ValueError, "`x` expected memory other than that of x_adv"),
        ({"x": X + 0, "x_adv": X, "grad": X.detach()}, ValueError, "`grad` expected memory other than that of x_adv"),
        ({"x_adv": X, "x": X[:], "backend": "reference"}, ValueError, "`x` expected memory other than that of x_adv"),
        ({"x_adv": X[:1].expand(2, 3, 4, 5)}, ValueError, "`x_adv` expected memory of its own for every element"),
        ({"centers": None}, TypeError, r"`centers` expected an integer tensor \[N, 2\] of rows and columns"),
        ({"centers": torch.zeros(2, 2)}, TypeError, "`centers` expected an integer dtype, got torch.float32"),
        ({"centers": torch.zeros(3, 2).long()}, ValueError, r"`centers` expected \[2, 2\], a row and a column"),
        ({"radius": -1}, ValueError, "`radius` expected an integer >= 0 or None, got -1"),
        ({"radius": 1.5}, TypeError, "`radius` expected an integer or None, got float"),
        ({"step_size": "0.1"}, TypeError, r"`step_size` expected a number or a tensor \[C\], got str"),
        ({"step_size": math.inf}, ValueError, "`step_size` expected a finite number, got inf"),
        ({"eps": -0.1}, ValueError, "`eps` expected a finite number >= 0, got -0.1"),
        ({"eps": torch.zeros(2)}, ValueError, r"`eps` expected a number or a tensor \[3\], got shape \[2\]"),
        ({"eps": torch.zeros(3).int()}, TypeError, "`eps` expected a floating-point tensor, got torch.int32"),
        ({"lower": math.nan}, ValueError, "`lower` expected a number, got nan"),
        ({"lower": 2.0}, ValueError, "`lower` expected a number <= upper, 1.0, got 2.0"),
        ({"upper": torch.zeros(3, device="meta")}, ValueError, "`upper` expected the device of the images, cpu"),
        ({"backend": "fast"}, ValueError, "`backend` expected one of"),
    ],
)
def test_errors_name_the_argument_and_change_nothing(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {
        "x_adv": X.clone(), "x": X, "grad": torch.ones_like(X), "centers": torch.zeros(2, 2).long(), "radius": 1,
        "step_size": 0.1, "eps": 0.1,
    }  # fmt: skip
    before = X.clone()
    arguments |= change
    with pytest.raises(error, match="masked_pgd_step_: " + text):
        masked_pgd_step_(**arguments)
    assert torch.equal(X, before)


@pytest.mark.parametrize("negated", [0, 1, 2])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_lazy_negation_is_seen(negated: int, backend: str) -> None:
    """The imaginary part of a conjugate is a view whose memory holds the values with the other sign."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(3, 2, 3, 4, 5, generator=generator)
    lazy = list(parts.clone())
    lazy[negated] = torch.complex(torch.zeros_like(parts[negated]), -parts[negated]).conj().imag
    assert lazy[negated].is_neg()
    options: Any = {"step_size": 0.1, "eps": 2.0, "lower": -1.0, "upper": 1.0, "backend": backend}
    expected = masked_pgd_step_(*parts.clone(), None, None, **options)
    assert torch.equal(masked_pgd_step_(*lazy, None, None, **options), expected)
