"""NAD's attention maps and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bdfast.integrations.backdoorbench.accelerated import AT


def test_by_hand() -> None:
    """Sums of squares over two channels: 5 and 0, so the map is 5 / (5 + eps) and 0."""
    fm = torch.tensor([[1.0, 0.0], [-2.0, 0.0]]).view(1, 2, 1, 2)
    torch.testing.assert_close(AT(2).attention_map(fm, eps=5.0).flatten(), torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize("p", [1, 2, 3, 2.5])
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_and_gradients(p: float, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fm, grad = torch.randn(3, 16, 7, 5), torch.randn(3, 1, 7, 5)
    if channels_last:
        fm = fm.contiguous(memory_format=torch.channels_last)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        out = AT(p).attention_map(x)
        return out.detach(), torch.autograd.grad(out, x, grad.to(x.dtype))[0]

    fast = both(fm)
    monkeypatch.setenv("BDFAST_REFERENCE", "1")
    for got, expected in zip(fast, both(fm.double()), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-6)


def test_gradcheck_and_loss() -> None:
    fm = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    other = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: AT(2)(x, other), fm)


def test_features_of_zeros_have_gradients_of_zeros() -> None:
    fm = torch.zeros(1, 3, 2, 2, requires_grad=True)
    AT(2).attention_map(fm).sum().backward()
    assert fm.grad is not None
    assert fm.grad.nan_to_num(9.0).abs().max() == 0.0


@pytest.mark.parametrize(
    ("fm", "error", "text"),
    [
        (torch.zeros(2, 3), ValueError, r"shape \[N, C, H, W\], got \[2, 3\]"),
        (torch.zeros(1, 1, 1, 1).int(), TypeError, "a floating-point tensor .*, got torch.int32"),
        (None, TypeError, "a floating-point tensor .*, got NoneType"),
    ],
)
def test_errors(fm: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"AT.attention_map: `fm` expected {text}"):
        AT(2).attention_map(fm)
