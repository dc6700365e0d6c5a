"""scale_to_ball_: hand-computed values, the ball, edges and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdfast.ops import scale_to_ball_

BACKENDS = ["cpp", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    d = torch.tensor([[3.0, -4.0], [0.25, 0.5], [0.0, 0.0]])
    out = scale_to_ball_(d, 2.5, backend=backend)
    assert out is d
    assert d.tolist() == [[1.5, -2.0], [0.25, 0.5], [0.0, 0.0]]
    d = torch.tensor([[3.0, -5.0], [0.25, 0.5], [0.0, 0.0]])
    assert scale_to_ball_(d, torch.tensor([4.0, 0.375, 0.0]), 1, backend=backend).tolist() == [
        [1.5, -2.5], [0.125, 0.25], [0.0, 0.0],
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    p=st.sampled_from([1, 2]),
    exponent=st.integers(-30, 30),
    backend=st.sampled_from(BACKENDS),
)
def test_inside_the_ball_and_along_the_same_direction(
    shape: tuple[int, ...], p: int, exponent: int, backend: str
) -> None:
    d = torch.randn(shape) * 10.0**exponent
    r = float(d.reshape(shape[0], -1).double().norm(p, dim=1).median()) * (1 + 1e-9)  # the median image is inside
    out = scale_to_ball_(d.clone(), r, p, backend=backend)
    norm, before = (t.double().reshape(shape[0], -1).norm(p, dim=1) for t in (out, d))
    assert (norm <= r * (1 + 1e-6)).all()
    kept = before <= r
    assert torch.equal(out[kept], d[kept])
    expected = d.double() * (r / before).clamp_max(1.0).reshape(-1, *(1,) * (d.dim() - 1))
    torch.testing.assert_close(out.double(), expected, rtol=2e-7, atol=1e-44)


@pytest.mark.parametrize("backend", BACKENDS)
def test_squares_past_the_range_of_float32(backend: str) -> None:
    d = torch.tensor([[3e30, 4e30], [3e-30, 4e-30]])
    torch.testing.assert_close(
        scale_to_ball_(d, torch.tensor([5.0, 5e-31]), backend=backend), torch.tensor([[3.0, 4.0], [3e-31, 4e-31]])
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_radii_that_are_no_radii(backend: str) -> None:
    d = scale_to_ball_(torch.ones(3, 2), torch.tensor([-1.0, math.nan, math.inf]), backend=backend)
    assert d[0].tolist() == [0.0, 0.0]
    assert d[1].isnan().all()
    assert d[2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_dim_radius_is_for_all(backend: str) -> None:
    assert torch.equal(
        scale_to_ball_(torch.ones(3, 4), torch.tensor(1.0), backend=backend),
        scale_to_ball_(torch.ones(3, 4), 1.0, backend=backend),
    )


def test_float64_runs_on_the_reference() -> None:
    d = scale_to_ball_(torch.full((1, 3), 1.0, dtype=torch.float64), 1.0)
    torch.testing.assert_close(d, torch.full((1, 3), 1 / math.sqrt(3), dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_through_the_old_values_raises(backend: str) -> None:
    d, scale = torch.ones(1, 4), torch.ones((), requires_grad=True)
    product = (scale * d).sum()
    scale_to_ball_(d, 1.0, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


D = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([1.0], 1.0), TypeError, r"`perturbation` expected a tensor \[N, ...\], got list"),
        ((D.int(), 1.0), TypeError, "`perturbation` expected float32, float16, bfloat16 or float64, got torch.int32"),
        ((D[0, 0], 1.0), ValueError, r"`perturbation` expected shape \[N, ...\], got \[\]"),
        ((D, 1.0, 3), ValueError, "`p` expected 1 or 2, got 3"),
        ((D, 1.0, math.inf), ValueError, "`p` expected 1 or 2, got inf"),
        ((D, -1.0), ValueError, "`radius` expected a finite number >= 0, got -1.0"),
        ((D, math.nan), ValueError, "`radius` expected a finite number >= 0, got nan"),
        ((D, "1"), TypeError, r"`radius` expected a number or a tensor \[N\], got str"),
        ((D, torch.ones(3)), ValueError, r"`radius` expected a number or a tensor \[2\], got shape \[3\]"),
        ((D, torch.ones(2, device="meta")), ValueError, "`radius` expected the device of perturbation, cpu, got meta"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="scale_to_ball_: " + text):
        scale_to_ball_(*arguments)
