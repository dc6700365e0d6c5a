"""Adding two gradients and masking them: as autograd and ``threshold_backward`` have it, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bdfast.backends.availability import runs_cpp, runs_triton
from bdfast.runtime import relu_gradient as module
from bdfast.runtime.relu_gradient import every, relu_gradient

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernel = pytest.mark.skipif(
    runs_triton(torch.empty(0, device=DEVICE)) is not None and runs_cpp(torch.empty(0, device=DEVICE)) is not None,
    reason="needs Triton, or bdfast._C",
)
needs_triton = pytest.mark.skipif(runs_triton(torch.empty(0, device=DEVICE)) is not None, reason="needs Triton")

SHAPES = [(2, 64, 4, 4), (3, 5, 7, 3), (1, 1, 1, 1), (2, 24, 3, 5), (5, 72, 1, 1), (2, 3, 40, 33), (0, 8, 4, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1.0]


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype, order: torch.memory_format) -> Tensor:
    """Numbers of all kinds, a few of them special; in the interpreter, which cuts bfloat16 off, whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    whole = dtype == torch.bfloat16 and DEVICE.type == "cpu"
    x = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).mul(8).exp()
    x = x.round().clamp(-64, 64) if whole else x
    special = torch.tensor(SPECIAL if whole else [*SPECIAL, 3e38, 1e-40])
    special = special[torch.randint(len(special), shape, generator=generator)]
    x = torch.where(torch.rand(shape, generator=generator) < 0.3, special, x)
    return x.to(DEVICE, dtype).contiguous(memory_format=order)


def plain(y: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """As PyTorch would."""
    return torch.ops.aten.threshold_backward(first + second, y, 0)  # type: ignore[no-any-return]


def assert_same(got: Tensor | None, wanted: Tensor) -> None:
    assert got is not None
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@needs_kernel
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_is_that_of_pytorch(shape: tuple[int, ...], order: torch.memory_format, dtype: torch.dtype) -> None:
    y, first, second = (draw(shape, seed, dtype, order) for seed in range(3))
    got = relu_gradient(y, (first, second))
    assert_same(got, plain(y, first, second))
    assert_same(relu_gradient(y, (second,)), torch.ops.aten.threshold_backward(second, y, 0))
    assert_same(relu_gradient(y, (first.contiguous(), second)), plain(y, first, second))
    assert got is not None
    assert got.numel() == 0 or got.is_contiguous(memory_format=order)


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (3, 1), (4, 5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_strided_gradient_is_added_where_its_pixels_are(
    shape: tuple[int, ...], stride: tuple[int, int], dtype: torch.dtype
) -> None:
    y, first = (draw(shape, seed, dtype, torch.channels_last) for seed in range(2))
    small = draw(y[:, :, :: stride[0], :: stride[1]].shape, 2, dtype, torch.channels_last)
    assert_same(relu_gradient(y, (first, small), stride), plain(y, first, module._spread(small, y, stride)))


@needs_triton
@pytest.mark.usefixtures("poisoned_empty")
def test_gradients_in_another_memory_order() -> None:
    shape = (3, 6, 5, 4)
    y = draw(shape, 0, torch.float32, torch.channels_last)
    first = draw((6, 3, 4, 5), 1, torch.float32, torch.contiguous_format).permute(1, 0, 3, 2)
    second = torch.ones(3, 6, 1, 1, device=DEVICE).expand(shape)
    assert_same(relu_gradient(y, (first, second)), plain(y, first, second))
    small = second[:, :, ::2, ::2]
    assert_same(relu_gradient(y, (first, small), (2, 2)), plain(y, first, module._spread(small, y, (2, 2))))
    y = y.contiguous()
    assert_same(relu_gradient(y, (first, second)), plain(y, first, second))
    assert_same(relu_gradient(y, (first, small), (2, 2)), plain(y, first, module._spread(small, y, (2, 2))))
    y = y.transpose(2, 3)
    assert_same(relu_gradient(y, (first.mT, second.mT)), plain(y, first.mT, second.mT))


def test_nan_activations_let_gradients_pass() -> None:
    """What PyTorch does: only what is <= 0 is masked."""
    y, grad = torch.tensor([math.nan, 0.0, -0.0, -1.0, 2.0]), torch.tensor([1.0, 1.0, math.nan, math.nan, math.nan])
    assert_same(relu_gradient(y, (grad, grad)), torch.tensor([2.0, 0.0, 0.0, 0.0, math.nan]))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_a_gradient_that_is_missing(stride: tuple[int, int]) -> None:
    y, grad = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    small = grad[:, :, :: stride[0], :: stride[1]]
    masked = torch.ops.aten.threshold_backward
    assert relu_gradient(y, (None, None), stride) is None
    assert relu_gradient(y, (None,)) is None
    assert_same(relu_gradient(y, (grad,)), masked(grad, y, 0))
    assert_same(relu_gradient(y, (grad, None), stride), masked(grad, y, 0))
    assert_same(relu_gradient(y, (None, small), stride), masked(module._spread(small, y, stride), y, 0))


@pytest.mark.parametrize("stride", [(2, 2), (1, 3), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 4, 8, 24])
def test_every_so_many_th_pixel(channels: int, dtype: torch.dtype, stride: tuple[int, int]) -> None:
    for order in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, channels, 5, 6).to(dtype).contiguous(memory_format=order)
        for y in (x, x[1:], x[:, :, 1:], x[:, channels // 2 :]):
            got = every(y, stride)
            assert torch.equal(got, y[:, :, :: stride[0], :: stride[1]])
            assert stride == (1, 1) or got.is_contiguous(memory_format=torch.channels_last)


def test_pixels_are_copied_in_wide_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    contiguous = Tensor.contiguous
    monkeypatch.setattr(Tensor, "contiguous", lambda x, **how: seen.append(x.dtype) or contiguous(x, **how))
    every(torch.zeros(2, 16, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last), (2, 2))
    assert seen[0] == torch.complex128
