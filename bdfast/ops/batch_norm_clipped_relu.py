r"""Batch norm in eval mode, ReLU and an upper bound a channel, in one pass over the activations.

.. math::

    t = \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}\, w_c + b_c, \qquad
    y = \min(\max(t, 0), z_c)

With frozen statistics and weights this is what stands between two convolutions of a clipped network (PAD-FT, arXiv
2409.12072, eq. 2), and only x and z have gradients:

.. math::

    \frac{\partial L}{\partial x} = g\,[0 < t \le z_c] \frac{w_c}{\sqrt{\sigma_c^2 + \epsilon}}, \qquad
    \frac{\partial L}{\partial z_c} = \sum_{n,h,w} g\,[\max(t, 0) > z_c]

PyTorch makes three passes of two, batch norm, ReLU and minimum; the least is one read and one write. Backward as in
:mod:`bdfast.ops.clipped_relu`, whose kernels it shares.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp, runs_triton
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.ops import channels as ch
from bdfast.ops.autograd import apply, once_differentiable, wants_gradient
from bdfast.ops.clipped_relu import BACKWARD, bit_addresses, clip, wanted
from bdfast.ops.precision import compute_dtype, in_precision_of
from bdfast.ops.rows import DTYPE_CODE
from bdfast.ops.validation import check_number

NAME = "batch_norm_clipped_relu"


def batch_norm_clipped_relu(
    x: Tensor,  # [N, C, ...]
    running_mean: Tensor,  # [C]
    running_var: Tensor,  # [C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    bound: Tensor | float | None = None,  # [], [C] or [C, 1, 1]
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """``min(max(batch_norm(x), 0), bound)`` with frozen statistics, differentiable in ``x`` and ``bound``.

    Args:
        x: ``[N, C, ...]`` float32, float16, bfloat16 (computed in float32) or float64 (reference only), of any strides;
            a copy is made only of tensors that are neither contiguous nor channels_last.
        running_mean: ``[C]``, floating-point.
        running_var: ``[C]``, floating-point, >= 0.
        weight: ``[C]``, or None for 1.
        bias: ``[C]``, or None for 0. Neither these two nor the statistics may require grad while autograd records:
            this op has no gradient for them.
        bound: a number >= 0, a floating-point tensor 0-dim, ``[C]`` or ``[C, 1, ...]``, or None for no bound.
        eps: added to the variance, >= 0.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        Of the shape and dtype of ``x``; channels_last where ``x`` is, else contiguous. Factor and offset of a channel
        are folded, ``x * scale + shift``, as PyTorch's CPU batch norm does. NaN gives NaN, and no gradient.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape or device does not fit, a number is negative, or a weight, bias or statistic requires grad.

    Example:
        >>> import torch, bdfast
        >>> x = torch.tensor([[-1.0, 2.0], [3.0, 5.0]])
        >>> mean, var = torch.tensor([1.0, 1.0]), torch.tensor([4.0, 4.0])
        >>> bdfast.ops.batch_norm_clipped_relu(x, mean, var, None, None, bound=1.5, eps=0.0)
        tensor([[0.0000, 0.5000], [1.0000, 1.5000]])
    """
    _check_activations(x)
    parameters = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    mean, var, w, b = (_parameter(name, value, x) for name, value in parameters.items())
    check_number(NAME, "eps", eps, "pass batch norm's eps")
    if not 0.0 <= eps < math.inf:
        raise ValueError(message(NAME, "eps", "a finite number >= 0", str(eps), "pass batch norm's eps"))
    z, limit = (None, math.inf) if bound is None else ch.split_bound(NAME, bound, x)
    wish = requested(backend, NAME)
    need_x = wants_gradient(NAME, x)
    need_bound = wants_gradient(NAME, z)
    if need_x or need_bound:
        return cast(Tensor, apply(_BatchNormClippedRelu, x, z, mean, var, w, b, eps, limit, need_x, need_bound, wish))
    return cast(Tensor, FORWARD(x, mean, var, w, b, eps, z, limit, False, False, wish)[0])


class _BatchNormClippedRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bound: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None,
        bias: Tensor | None, eps: float, limit: float, need_x: bool, need_bound: bool, backend: str,
    ) -> Tensor:  # fmt: skip
        y, bits, scale = FORWARD(x, mean, var, weight, bias, eps, bound, limit, need_x, need_bound, backend)
        ctx.save_for_backward(bits, scale)
        ctx.bound_shape = torch.Size() if bound is None else bound.shape
        ctx.options = (ch.is_channels_last(x), need_x, need_bound, 1 if bound is None else bound.numel(), backend)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_bound = BACKWARD(grad, *ctx.saved_tensors, *ctx.options)
        return *wanted(grad_x, grad_bound, ctx.bound_shape, *ctx.options[1:3]), *(None,) * 9


# --- reference: the equations in plain PyTorch -----------------------------------------------------------------------


def reference(
    x: Tensor,  # [N, C, ...]
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    bound: Tensor | None,  # [] or [C]
    limit: float,
    need_x: bool,
    need_bound: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The activations, the bits that the backward starts from, and the factor ``[C]`` of each channel."""
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    t = (x.to(scale.dtype) - ch.per_channel(mean, x)) * ch.per_channel(scale, x)
    if bias is not None:
        t = t + ch.per_channel(bias, x)
    channels_last = ch.is_channels_last(x)
    y, bits = clip(t, bound, limit, need_x, need_bound, channels_last)
    return ch.dense(y.to(x.dtype), channels_last), bits, scale


# --- compiled implementations ----------------------------------------------------------------------------------------


def _cpp(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    bound: Tensor | None, limit: float, need_x: bool, need_bound: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    channels_last = ch.is_channels_last(x)
    x = ch.dense(x, channels_last)
    y, bits = ch.empty_dense(x, channels_last), ch.empty_bits(x, need_x + need_bound)
    scale = x.new_empty(len(mean), dtype=torch.float32)
    parameters = [None if p is None else p.contiguous() for p in (mean, var, weight, bias, bound)]
    *statistics, z = (0 if p is None else p.data_ptr() for p in parameters)
    native().batch_norm_clipped_relu_fwd(
        x.data_ptr(), DTYPE_CODE[x.dtype], x.numel(), len(mean), ch.inner(x, channels_last), *statistics, eps,
        z, 1 if bound is None else bound.numel(), limit, y.data_ptr(), scale.data_ptr(),
        *bit_addresses(bits, need_x, need_bound),
    )  # fmt: skip
    return y, bits, scale


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from bdfast.triton_kernels import batch_norm_clipped_relu as kernels

    return kernels.forward(*arguments)  # type: ignore[no-any-return]


def _fake(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    bound: Tensor | None, limit: float, need_x: bool, need_bound: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        ch.empty_dense(x, ch.is_channels_last(x)),
        ch.empty_bits(x, need_x + need_bound),
        mean.new_empty(mean.shape, dtype=compute_dtype(x)),
    )


FORWARD = Op(
    name="batch_norm_clipped_relu_fwd",
    public=NAME,
    schema="(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? bound, float limit, "
    "bool need_x, bool need_bound, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    key=lambda x, *_: x,
    implementations=(
        Implementation("cpp", _cpp, runs_cpp),
        Implementation("triton", _triton, runs_triton),
        Implementation("reference", reference, always),
    ),
)


# --- validation ------------------------------------------------------------------------------------------------------


def _check_activations(x: Tensor) -> None:
    ch.check_activations(NAME, x)
    if x.dim() < 2:
        raise ValueError(message(NAME, "x", "shape [N, C, ...]", str(list(x.shape)), "add a batch dimension"))


def _parameter(name: str, value: Tensor | None, x: Tensor) -> Tensor | None:
    """A statistic or weight ``[C]`` in the dtype that is computed in."""
    if value is None and name in ("weight", "bias"):
        return None
    value = ch.check_per_channel(NAME, name, value, x)
    if value.requires_grad and torch.is_grad_enabled():
        remedy = "freeze it with .requires_grad_(False), detach it, or use torch.no_grad()"
        raise ValueError(message(NAME, name, "a tensor that does not require grad", "one that does", remedy))
    return in_precision_of(value, x)
