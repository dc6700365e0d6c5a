r"""The gradient of a ReLU whose output one layer reads, or two, as where a shortcut begins.

.. math::

    \frac{\partial \ell}{\partial t} = [y > 0] \sum_i g_i, \qquad y = \max(t, 0)

Autograd adds the gradients of two readers in one pass, 2 reads and a write, and masks the sum in a second. On a GPU one
kernel does both, with 3 reads and a write. The sum is rounded to the dtype of the gradients before it is masked, as
autograd does: the result is the same to the bit. On a CPU one pass does both, too.

A reader that sees every second pixel alone has a small gradient; the other pixels' zeros are neither made nor read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from bdfast.backends.availability import native, runs_cpp, runs_triton
from bdfast.ops.rows import DTYPE_CODE

Stride: TypeAlias = tuple[int, int]
"""Which pixels a second reader sees: every so many-th row and column; ``(1, 1)`` is all."""

WIDE = 16  # bytes that a thread moves at once


def every(
    y: Tensor,  # [N, C, H, W]
    stride: Stride,
) -> Tensor:
    """``y[:, :, ::h, ::w]`` as a tensor of its own, dense in memory; an alias of y where that is all of it.

    PyTorch copies strided views an element at a time. Where pixels are next to each other, elements of 16 bytes are
    copied instead.

    Example:
        >>> every(torch.arange(16.0).reshape(1, 1, 4, 4), (2, 2))
        tensor([[[[ 0.,  2.],
                  [ 8., 10.]]]])
    """
    if stride == (1, 1):
        return y.detach()
    pixels = y.detach()[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1)  # [N, H', W', C]
    size = pixels.element_size()
    places = (*pixels.stride()[:3], pixels.storage_offset(), pixels.shape[3])
    if pixels.stride(3) == 1 and all(place * size % WIDE == 0 for place in places):
        pixels = pixels.view(torch.complex128).contiguous().view(y.dtype)
    return pixels.contiguous().permute(0, 3, 1, 2)


def relu_gradient(
    y: Tensor,  # [N, C, H, W]
    grads: Sequence[Tensor | None],
    stride: Stride = (1, 1),
) -> Tensor | None:
    """The gradient of what y is the ReLU of, from those of its readers; None where there is none.

    Args:
        y: the output of the ReLU.
        grads: of its readers, one or two, ``[N, C, H, W]``; None for one that does not matter to the loss.
        stride: the pixels that the second reader sees; its gradient is ``[N, C, H', W']``.

    Example:
        >>> y = torch.tensor([0.0, 1.0, 2.0])
        >>> relu_gradient(y, (torch.ones(3), y))
        tensor([0., 2., 3.])
    """
    first, second = (*grads, None)[:2]
    if second is not None and stride != (1, 1) and (first is None or not _takes_strided(y)):
        second, stride = _spread(second, y, stride), (1, 1)
    if first is None:
        first, second = second, None
    if first is None:
        return None
    if second is None or runs_triton(y) is not None:
        if _takes_cpp(y):
            return _masked_sum(y, first, second)
        grad = first if second is None else first + second
        return torch.ops.aten.threshold_backward(grad, y, 0)  # type: ignore[no-any-return]
    from bdfast.triton_kernels import masked_sum as kernels

    if stride == (1, 1):
        return kernels.masked_sum(y, first, second)  # type: ignore[no-any-return]
    return kernels.masked_strided_sum(y, first, second, stride)  # type: ignore[no-any-return]


def _takes_cpp(y: Tensor) -> bool:
    dense = y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)
    return dense and runs_cpp(y) is None


def _masked_sum(y: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    out = torch.empty_like(y)
    grads = [torch.empty_like(y).copy_(g) if g.stride() != y.stride() else g for g in (first, second) if g is not None]
    addresses = [g.data_ptr() for g in grads] + [0] * (2 - len(grads))
    native().masked_sum(y.data_ptr(), *addresses, DTYPE_CODE[y.dtype], y.numel(), out.data_ptr())
    return out


def _takes_strided(y: Tensor) -> bool:
    return y.is_contiguous(memory_format=torch.channels_last) and runs_triton(y) is None


def _spread(grad: Tensor, y: Tensor, stride: Stride) -> Tensor:
    """The gradient of all pixels from that of every so many-th."""
    whole = torch.zeros_like(y)
    whole[:, :, :: stride[0], :: stride[1]] = grad
    return whole
