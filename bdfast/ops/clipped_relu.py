r"""ReLU with an upper bound a channel, and gradients for both: the clipped activations of MM-BD and PAD-FT.

.. math::

    y = \min(\max(x, 0), z_c), \qquad
    \frac{\partial L}{\partial x} = g\,[0 < x \le z_c], \qquad
    \frac{\partial L}{\partial z_c} = \sum_{n,h,w} g\,[\max(x, 0) > z_c]

(MM-BD, arXiv 2205.06900; PAD-FT, arXiv 2409.12072, eq. 2.) A tie goes to x. The least that has to move is one read and
one write each way: the backward starts from the two conditions, saved as one bit an element each and only where that
gradient is wanted, and never sees x again.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp, runs_triton
from bdfast.backends.registry import always
from bdfast.ops import channels as ch
from bdfast.ops.autograd import apply, once_differentiable, wants_gradient
from bdfast.ops.precision import compute_dtype, upcast
from bdfast.ops.rows import DTYPE_CODE

NAME = "clipped_relu"


def clipped_relu(
    x: Tensor,  # [N, C, ...]
    bound: Tensor | float,  # [], [C] or [C, 1, 1]
    *,
    backend: str = "auto",
) -> Tensor:
    """``min(max(x, 0), bound)``, differentiable in ``x`` and ``bound``.

    Args:
        x: ``[N, C, ...]`` float32, float16, bfloat16 (compared in float32) or float64 (reference only), of any strides;
            of any shape where there is one bound for all. A copy is made only of tensors that are neither contiguous
            nor channels_last.
        bound: a number >= 0, or a floating-point tensor: 0-dim, ``[C]``, or ``[C, 1, ...]``. Infinity leaves a ReLU. A
            tensor's values are not checked; where negative they bound all the same.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        Of the shape and dtype of ``x``; channels_last where ``x`` is, else contiguous. NaN in ``x`` or ``bound`` gives
        NaN, and no gradient. The gradient of ``bound`` is summed in float64; reruns are bit-identical.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: the shape or device of ``bound`` does not fit, or it is a negative number.

    Example:
        >>> import torch, bdfast
        >>> x = torch.tensor([[-1.0, 2.0], [3.0, 5.0]], requires_grad=True)
        >>> bound = torch.tensor([4.0, 4.0], requires_grad=True)
        >>> y = bdfast.ops.clipped_relu(x, bound)
        >>> y
        tensor([[0., 2.], [3., 4.]], grad_fn=...)
        >>> y.sum().backward()
        >>> x.grad, bound.grad
        (tensor([[0., 1.], [1., 0.]]), tensor([0., 1.]))
    """
    ch.check_activations(NAME, x)
    z, limit = ch.split_bound(NAME, bound, x)
    wish = requested(backend, NAME)
    need_x = wants_gradient(NAME, x)
    need_bound = wants_gradient(NAME, z)
    if need_x or need_bound:
        return cast(Tensor, apply(_ClippedRelu, x, z, limit, need_x, need_bound, wish))
    return cast(Tensor, FORWARD(x, z, limit, False, False, wish)[0])


class _ClippedRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bound: Tensor | None, limit: float, need_x: bool, need_bound: bool, backend: str
    ) -> Tensor:
        y, bits = FORWARD(x, bound, limit, need_x, need_bound, backend)
        ctx.save_for_backward(bits)
        ctx.bound_shape = torch.Size() if bound is None else bound.shape
        ctx.options = (ch.is_channels_last(x), need_x, need_bound, 1 if bound is None else bound.numel(), backend)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_bound = BACKWARD(grad, ctx.saved_tensors[0], None, *ctx.options)
        return *wanted(grad_x, grad_bound, ctx.bound_shape, *ctx.options[1:3]), None, None, None, None


def wanted(
    grad_x: Tensor, grad_bound: Tensor, bound_shape: torch.Size, need_x: bool, need_bound: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What autograd is to have of the two outputs of the raw backward."""
    if grad_bound.shape != bound_shape and need_bound:
        grad_bound = grad_bound.reshape(bound_shape)
    return grad_x if need_x else None, grad_bound if need_bound else None


# --- reference: the equations in plain PyTorch -----------------------------------------------------------------------


def reference(
    x: Tensor,  # [N, C, ...]
    bound: Tensor | None,  # [] or [C]
    limit: float,
    need_x: bool,
    need_bound: bool,
) -> tuple[Tensor, Tensor]:
    """The clipped activations, and the bits that the backward starts from."""
    y, bits = clip(upcast(x), bound, limit, need_x, need_bound, ch.is_channels_last(x))
    return ch.dense(y.to(x.dtype), ch.is_channels_last(x)), bits


def clip(
    t: Tensor, bound: Tensor | None, limit: float, need_x: bool, need_bound: bool, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """``min(max(t, 0), bound)`` and the bits ``[0 < t <= bound]`` and ``[max(t, 0) > bound]``, as far as needed."""
    z = torch.full_like(t, limit) if bound is None else ch.per_channel(bound, t).expand_as(t)
    r = t.relu()
    masks = [(r > 0) & (r <= z)] * need_x + [r > z] * need_bound
    bits = [ch.pack(mask, channels_last) for mask in masks]
    return torch.minimum(r, z), torch.stack(bits) if bits else ch.empty_bits(t, 0)


def reference_backward(
    grad: Tensor,  # [N, C, ...]
    bits: Tensor,  # int32 [gradients, blocks, 16]
    scale: Tensor | None,  # [C]
    channels_last: bool,
    need_x: bool,
    need_bound: bool,
    bounds: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the ``bounds`` bounds (empty where not needed)."""
    g = upcast(grad)
    grad_x, grad_bound = grad.new_empty(0), g.new_empty(0)
    if need_x:
        scaled = g if scale is None else g * ch.per_channel(scale, g)
        passed = torch.where(ch.unpack(bits[0], grad, channels_last), scaled, torch.zeros_like(scaled))
        grad_x = ch.dense(passed.to(grad.dtype), channels_last)
    if need_bound:
        clipped = torch.where(ch.unpack(bits[-1], grad, channels_last), g, torch.zeros_like(g))
        grad_bound = ch.sum_over_channel(clipped, bounds).to(g.dtype)
    return grad_x, grad_bound


# --- compiled implementations ----------------------------------------------------------------------------------------


def _fake(x: Tensor, bound: Tensor | None, limit: float, need_x: bool, need_bound: bool, backend: str) -> Any:
    return ch.empty_dense(x, ch.is_channels_last(x)), ch.empty_bits(x, need_x + need_bound)


def _cpp(x: Tensor, bound: Tensor | None, limit: float, need_x: bool, need_bound: bool) -> tuple[Tensor, Tensor]:
    channels_last = ch.is_channels_last(x)
    x, bound = ch.dense(x, channels_last), None if bound is None else bound.contiguous()
    y, bits = ch.empty_dense(x, channels_last), ch.empty_bits(x, need_x + need_bound)
    if x.numel() == 0:
        return y, bits
    native().clipped_relu_fwd(
        x.data_ptr(), DTYPE_CODE[x.dtype], *ch.layout(x, channels_last, 1 if bound is None else bound.numel()),
        0 if bound is None else bound.data_ptr(), limit, y.data_ptr(), *bit_addresses(bits, need_x, need_bound),
    )  # fmt: skip
    return y, bits


def bit_addresses(bits: Tensor, need_x: bool, need_bound: bool) -> tuple[int, int]:
    """Where the bits of x's gradient and of the bound's are; 0 for one that is not needed."""
    return bits[0].data_ptr() if need_x else 0, bits[-1].data_ptr() if need_bound else 0


def _cpp_backward(
    grad: Tensor, bits: Tensor, scale: Tensor | None, channels_last: bool, need_x: bool, need_bound: bool, bounds: int
) -> tuple[Tensor, Tensor]:
    g, bits = ch.dense(grad, channels_last), bits.contiguous()
    grad_x = ch.empty_dense(g, channels_last) if need_x else g.new_empty(0)
    grad_bound = g.new_zeros(bounds if need_bound else 0, dtype=torch.float32)
    if g.numel() == 0:
        return grad_x, grad_bound
    native().clipped_relu_bwd(
        g.data_ptr(), DTYPE_CODE[g.dtype], *ch.layout(g, channels_last, bounds if scale is None else scale.numel()),
        0 if scale is None else scale.data_ptr(), *bit_addresses(bits, need_x, need_bound), bounds,
        grad_x.data_ptr(), grad_bound.data_ptr(),
    )  # fmt: skip
    return grad_x, grad_bound


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from bdfast.triton_kernels import clipped_relu as kernels

    return kernels.forward(*arguments)  # type: ignore[no-any-return]


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from bdfast.triton_kernels import clipped_relu as kernels

    return kernels.backward(*arguments)  # type: ignore[no-any-return]


def _fake_backward(
    grad: Tensor, bits: Tensor, scale: Tensor | None, channels_last: bool, need_x: bool, need_bound: bool, bounds: int,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_x = ch.empty_dense(grad, channels_last) if need_x else grad.new_empty(0)
    return grad_x, grad.new_empty(bounds if need_bound else 0, dtype=compute_dtype(grad))


FORWARD = Op(
    name="clipped_relu_fwd",
    public=NAME,
    schema="(Tensor x, Tensor? bound, float limit, bool need_x, bool need_bound, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    key=lambda x, *_: x,
    implementations=(
        Implementation("cpp", _cpp, runs_cpp),
        Implementation("triton", _triton, runs_triton),
        Implementation("reference", reference, always),
    ),
)

BACKWARD = Op(
    name="clipped_relu_bwd",
    public=NAME,
    schema="(Tensor grad, Tensor bits, Tensor? scale, bool channels_last, bool need_x, bool need_bound, int bounds, "
    "str backend) -> (Tensor, Tensor)",
    fake=_fake_backward,
    key=lambda grad, *_: grad,
    implementations=(
        Implementation("cpp", _cpp_backward, runs_cpp),
        Implementation("triton", _triton_backward, runs_triton),
        Implementation("reference", reference_backward, always),
    ),
)
