r"""Batch norm in training mode, a shortcut and ReLU, with the least traffic that statistics of the batch allow.

.. math::

    y = \max\left((x - \mu_c)\, \frac{w_c}{\sqrt{\sigma_c^2 + \epsilon}} + b_c + r,\ 0\right), \qquad
    \mu_c = \frac{1}{M} \sum x_c, \quad \sigma_c^2 = \frac{1}{M} \sum (x_c - \mu_c)^2

over the M values of a channel (batch and space); Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 1. With
:math:`\hat x = (x - \mu_c) / \sqrt{\sigma_c^2 + \epsilon}` and :math:`g = [y > 0]\, \partial L / \partial y` the
gradients are

.. math::

    \frac{\partial L}{\partial x} = \frac{w_c}{\sqrt{\sigma_c^2 + \epsilon}}
    \left(g - \frac{1}{M} \sum g - \hat x\, \frac{1}{M} \sum g \hat x\right), \qquad
    \frac{\partial L}{\partial w_c} = \sum g \hat x, \quad
    \frac{\partial L}{\partial b_c} = \sum g, \quad
    \frac{\partial L}{\partial r} = g

What the backward starts from is kept a channel: a pivot p near the mean, the factor s and the offset t of
:math:`y = \max((x - p) s + t + r, 0)`, the inverse deviation, and the mean less p. Subtracting first loses nothing
where a mean is large beside the deviation.

Bytes moved an element: two reads and one write forward; four reads and one write backward, whose mask is computed again
from x. A shortcut adds a read forward, and backward a write of g, which then is read in place of mask and gradient.

On a CPU the second read of a plane, both ways, is from a cache where the values of a channel fit in one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp, runs_triton
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.ops import channels as ch
from bdfast.ops.autograd import apply, once_differentiable, wants_gradient
from bdfast.ops.precision import compute_dtype, in_precision_of
from bdfast.ops.rows import DTYPE_CODE
from bdfast.ops.validation import check_number

NAME = "batch_norm_relu"


class BatchNormed(NamedTuple):
    """What :func:`batch_norm_relu` returns.

    Attributes:
        y: the activations, of the shape, dtype and memory order of ``x``.
        mean: of the batch, ``[C]`` float32 (float64 for float64), not differentiable.
        var: of the batch, biased, as ``mean``.
    """

    y: Tensor
    mean: Tensor
    var: Tensor


def batch_norm_relu(
    x: Tensor,  # [N, C, ...]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    residual: Tensor | None = None,  # [N, C, ...]
    *,
    running_mean: Tensor | None = None,  # [C]
    running_var: Tensor | None = None,  # [C]
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    backend: str = "auto",
) -> BatchNormed:
    """``relu(batch_norm(x) + residual)`` with the statistics of the batch.

    Args:
        x: ``[N, C, ...]`` float32, float16, bfloat16 (computed in float32) or float64 (reference only), of any strides;
            a copy is made only of tensors that are neither contiguous nor channels_last.
        weight: ``[C]``, floating-point.
        bias: ``[C]``, floating-point.
        residual: added in front of the ReLU, of the shape and dtype of ``x``; None for none.
        running_mean, running_var: ``[C]`` of the dtype that is computed in, contiguous; both or neither. They are
            changed in place, ``(1 - momentum) running + momentum batch``, with the unbiased variance, as
            :func:`torch.nn.functional.batch_norm` does. An empty batch leaves them.
        momentum: see there, in [0, 1].
        eps: added to the variance, >= 0.
        relu: whether to take the ReLU.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        :class:`BatchNormed`; ``y`` is rounded once, from float32. It is differentiable once, in ``x``, ``weight``,
        ``bias`` and ``residual``. The kernel adds some hundred values about a pivot in float32, and such
        sums in float64: statistics err by less than 1e-6 of the deviation. Reruns are bit-identical.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape, dtype or device does not fit, or a number is out of range.

    Example:
        >>> import torch, bdfast
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> y, mean, var = bdfast.ops.batch_norm_relu(x, torch.tensor([2.0]), torch.tensor([1.0]), eps=0.0)
        >>> y.tolist(), mean.item(), var.item()
        ([[0.0], [3.0]], 2.0, 1.0)
    """
    _check_activations(x, residual)
    w, b = (_parameter(name, value, x) for name, value in (("weight", weight), ("bias", bias)))
    _check_running(running_mean, running_var, x)
    for name, value, most in (("momentum", momentum, 1.0), ("eps", eps, math.inf)):
        check_number(NAME, name, value, "pass that of the batch norm")
        if not 0.0 <= value <= most or value == math.inf:
            expected = "a number in [0, 1]" if name == "momentum" else "a finite number >= 0"
            raise ValueError(message(NAME, name, expected, str(value), "pass that of the batch norm"))
    inputs = (x, w, b, residual, running_mean, running_var, float(momentum), float(eps), relu, requested(backend, NAME))
    if wants_gradient(NAME, x, w, b, residual):
        return BatchNormed(*apply(_BatchNormReLU, *inputs))
    return BatchNormed(*FORWARD(*inputs)[:3])


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var, saved = FORWARD(x, *rest)
        residual, relu, backend = rest[2], rest[-2], rest[-1]
        ctx.masked = relu and residual is not None  # by the output, which only then is needed
        ctx.save_for_backward(x, y if ctx.masked else None, saved)
        ctx.options, ctx.has_residual = (relu, backend), residual is not None
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        grad_x, masked, grad_weight, grad_bias = BACKWARD(grad, *ctx.saved_tensors, *ctx.options)
        grad_residual = None if not ctx.has_residual else masked if ctx.masked else grad
        return grad_x, grad_weight, grad_bias, grad_residual, *(None,) * 6


# --- reference: the equations in plain PyTorch -----------------------------------------------------------------------


def reference(
    x: Tensor,  # [N, C, ...]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    residual: Tensor | None,  # [N, C, ...]
    running_mean: Tensor | None,  # [C]
    running_var: Tensor | None,  # [C]
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The activations, mean and variance, and ``[5, C]``: pivot, factor, offset, inverse deviation, mean - pivot."""
    dtype, count = compute_dtype(x), x.numel() // x.shape[1]
    values = x.double().movedim(1, 0).flatten(1)
    mu = values.mean(dim=1)
    sigma2 = (values - mu[:, None]).square().mean(dim=1)
    if running_mean is not None and running_var is not None and count:
        running_mean.lerp_(mu.to(running_mean.dtype), momentum)
        running_var.lerp_((sigma2 * (count / max(1, count - 1))).to(running_var.dtype), momentum)
    pivot = mu.to(dtype)
    delta, inverse = mu - pivot.double(), (sigma2 + eps).rsqrt()
    scale = weight.double() * inverse
    saved = torch.stack((pivot, *(s.to(dtype) for s in (scale, bias.double() - delta * scale, inverse, delta))))
    y = _normalised(x, saved)
    y = y if residual is None else y + residual.to(dtype)
    y = torch.relu(y) if relu else y
    return ch.dense(y.to(x.dtype), ch.is_channels_last(x)), mu.to(dtype), sigma2.to(dtype), saved


def reference_backward(
    grad: Tensor,  # [N, C, ...]
    x: Tensor,  # [N, C, ...]
    y: Tensor | None,  # [N, C, ...]; None where the mask follows from x
    saved: Tensor,  # [5, C]
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the residual where ``y`` is given (else empty), of weight and bias."""
    dtype, channels_last = compute_dtype(x), ch.is_channels_last(x)
    if relu:
        mask = (_normalised(x, saved).to(x.dtype) if y is None else y) <= 0  # NaN keeps its gradient, as in torch
        grad = grad.masked_fill(mask, 0.0)
    pivot, scale, _, inverse, delta = (ch.per_channel(s.double(), x) for s in saved)
    g, x_hat = grad.double(), (x.double() - pivot - delta) * inverse
    dims, count = [d for d in range(x.dim()) if d != 1], max(1, x.numel() // x.shape[1])
    grad_bias, grad_weight = g.sum(dims), (g * x_hat).sum(dims)
    means = (ch.per_channel(s / count, x) for s in (grad_bias, grad_weight))
    grad_x = scale * (g - next(means) - x_hat * next(means))
    masked = ch.dense(grad, channels_last) if y is not None else x.new_empty(0)
    return ch.dense(grad_x.to(x.dtype), channels_last), masked.clone(), grad_weight.to(dtype), grad_bias.to(dtype)


def _normalised(x: Tensor, saved: Tensor) -> Tensor:
    pivot, scale, shift = (ch.per_channel(s, x) for s in saved[:3])
    return (x.to(saved.dtype) - pivot) * scale + shift


# --- compiled implementations ----------------------------------------------------------------------------------------


def _cpp(
    x: Tensor,  # [N, C, ...]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    residual: Tensor | None,  # [N, C, ...]
    running_mean: Tensor | None,  # [C]
    running_var: Tensor | None,  # [C]
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels_last = ch.is_channels_last(x)
    x, residual = ch.dense(x, channels_last), None if residual is None else ch.dense(residual, channels_last)
    y, saved = ch.empty_dense(x, channels_last), x.new_empty((5, x.shape[1]), dtype=torch.float32)
    mean, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return y, mean.fill_(torch.nan), var.fill_(torch.nan), saved.fill_(torch.nan)
    native().batch_norm_relu_fwd(
        *_activations(x, channels_last), *map(_address, (weight, bias, residual, running_mean, running_var)),
        momentum, eps, relu, *map(_address, (y, mean, var, saved)),
    )  # fmt: skip
    return y, mean, var, saved


def _cpp_backward(
    grad: Tensor,  # [N, C, ...]
    x: Tensor,  # [N, C, ...]
    y: Tensor | None,  # [N, C, ...]; None where the mask follows from x
    saved: Tensor,  # [5, C]
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels_last = ch.is_channels_last(x)
    x, grad, saved = ch.dense(x, channels_last), ch.dense(grad, channels_last), saved.contiguous()
    y = None if y is None else ch.dense(y, channels_last)
    grad_x, masked = ch.empty_dense(x, channels_last), None if y is None else ch.empty_dense(x, channels_last)
    grad_weight, grad_bias = (x.new_zeros(x.shape[1], dtype=torch.float32) for _ in range(2))
    if x.numel():
        native().batch_norm_relu_bwd(
            *_activations(x, channels_last), *map(_address, (grad, y, saved)), relu,
            *map(_address, (grad_x, masked, grad_weight, grad_bias)),
        )  # fmt: skip
    return grad_x, x.new_empty(0) if masked is None else masked, grad_weight, grad_bias


def _activations(x: Tensor, channels_last: bool) -> tuple[int, ...]:
    return x.data_ptr(), DTYPE_CODE[x.dtype], *ch.layout(x, channels_last, x.shape[1])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bdfast.triton_kernels import batch_norm_relu as kernels

    return kernels.forward(*arguments)  # type: ignore[no-any-return]


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bdfast.triton_kernels import batch_norm_relu_backward as kernels

    return kernels.backward(*arguments)  # type: ignore[no-any-return]


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, channels = compute_dtype(x), x.shape[1]
    mean, var = (x.new_empty(channels, dtype=dtype) for _ in range(2))
    return ch.empty_dense(x, ch.is_channels_last(x)), mean, var, x.new_empty((5, channels), dtype=dtype)


def _fake_backward(grad: Tensor, x: Tensor, y: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias = (x.new_empty(x.shape[1], dtype=compute_dtype(x)) for _ in range(2))
    channels_last = ch.is_channels_last(x)
    masked = x.new_empty(0) if y is None else ch.empty_dense(x, channels_last)
    return ch.empty_dense(x, channels_last), masked, weight, bias


FORWARD = Op(
    name="batch_norm_relu_fwd",
    public=NAME,
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps, bool relu, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    key=lambda x, *_: x,
    implementations=(
        Implementation("cpp", _cpp, runs_cpp),
        Implementation("triton", _triton, runs_triton),
        Implementation("reference", reference, always),
    ),
)

BACKWARD = Op(
    name="batch_norm_relu_bwd",
    public=NAME,
    schema="(Tensor grad, Tensor x, Tensor? y, Tensor saved, bool relu, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    key=lambda grad, x, *_: x,
    implementations=(
        Implementation("cpp", _cpp_backward, runs_cpp),
        Implementation("triton", _triton_backward, runs_triton),
        Implementation("reference", reference_backward, always),
    ),
)


# --- validation ------------------------------------------------------------------------------------------------------


def _check_activations(x: Tensor, residual: Tensor | None) -> None:
    ch.check_activations(NAME, x)
    if x.dim() < 2 or x.shape[1] == 0:
        got = str(list(x.shape))
        raise ValueError(message(NAME, "x", "shape [N, C, ...] with C >= 1", got, "pass a batch of activations"))
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(message(NAME, "residual", "a tensor or None", type(residual).__name__, "pass a torch.Tensor"))
    for what in ("shape", "dtype", "device"):
        expected, got = getattr(x, what), getattr(residual, what)
        if expected != got:
            error = TypeError if what == "dtype" else ValueError
            raise error(message(NAME, "residual", f"the {what} of x, {expected}", str(got), "add it outside"))


def _parameter(name: str, value: Tensor, x: Tensor) -> Tensor:
    """``value`` as the raw ops take it: ``[C]``, contiguous, of the dtype that is computed in."""
    ch.check_per_channel(NAME, name, value, x)
    return in_precision_of(value, x).contiguous()


def _check_running(mean: Tensor | None, var: Tensor | None, x: Tensor) -> None:
    """Both or neither, and such as can be written in place."""
    if (mean is None) != (var is None):
        name, other = ("running_var", "running_mean") if var is None else ("running_mean", "running_var")
        raise ValueError(message(NAME, name, f"a tensor beside `{other}`", "None", "pass both or neither"))
    for name, value in (("running_mean", mean), ("running_var", var)):
        if value is None:
            continue
        ch.check_per_channel(NAME, name, value, x)
        if value.dtype != compute_dtype(x) or not value.is_contiguous() or value.requires_grad:
            expected = f"a contiguous buffer of {compute_dtype(x)}"
            got = f"{value.dtype}, strides {value.stride()}, requires_grad={value.requires_grad}"
            raise ValueError(message(NAME, name, expected, got, "leave both out, and update them from mean and var"))
