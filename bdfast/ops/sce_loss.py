r"""Symmetric cross entropy: cross entropy plus its reverse, which tolerates wrong labels.

.. math::

    \mathrm{CE} = -\log p_y, \quad \mathrm{RCE} = -\sum_j p_j \log q_j = |A| (1 - p_y), \quad
    \ell = \alpha\, \mathrm{CE} + \beta\, \mathrm{RCE}, \quad
    \frac{\partial \ell}{\partial z_j} = (p_j - [j = y]) (\alpha + \beta |A| p_y)

with q the one-hot label and log 0 := A < 0 (Wang et al., ICCV 2019; the loss of PAD-FT, arXiv 2409.12072). Through the
margin :math:`m` of :mod:`bdfast.ops.sce_margin`, :math:`1 - p_y` is sigmoid(m) and CE is softplus(m): exact where
:math:`p_y` rounds to 1. The least that has to move is one read of the logits forward, one read and one write backward.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp, runs_triton
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.ops import validation
from bdfast.ops.autograd import apply, once_differentiable, wants_gradient
from bdfast.ops.precision import compute_dtype, upcast
from bdfast.ops.rows import (
    DTYPE_CODE,
    REDUCTIONS,
    classes_contiguous,
    label_logit,
    label_mask,
    makes_gradient_ahead,
    reduce_rows,
    scale_ahead_,
)
from bdfast.ops.sce_margin import margin_of, other_classes

NAME = "sce_loss"


def sce_loss(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N] int64
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    log_zero: float = -4.0,
    reduction: Literal["none", "sum", "mean"] = "none",
    clamp: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Symmetric cross entropy, ``alpha * CE + beta * RCE``, differentiable in ``logits``.

    Args:
        logits: ``[N, C]`` float32, float16, bfloat16 (row arithmetic in float32) or float64 (reference only).
        target: ``[N]`` int64 class labels in ``[0, C)``. A label out of range raises on the CPU; on a GPU it gives NaN
            for its row and never reads outside the row (``with bdfast.debug():`` raises there too).
        alpha: weight of cross entropy, >= 0 (0.1 for CIFAR-10 and 6 for CIFAR-100 in the SCE authors' code).
        beta: weight of reverse cross entropy, >= 0 (1 and 0.1 there).
        log_zero: A, what stands for log 0 in the reverse term, < 0. The SCE paper has -4, its code ``ln 1e-4``.
        reduction: ``"none"`` gives ``[N]``, ``"sum"`` and ``"mean"`` a scalar, summed over rows in float64. The mean of
            an empty batch is NaN.
        clamp: a floor of the probabilities in the reverse term, for parity with code that has one: 1e-7 together with
            ``log_zero=math.log(1e-4)`` gives the float32 losses of the SCE authors' formula bit for bit. Reference
            backend only. Its gradient is that of the formula: a clamped probability has none.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        float32 (float64 for float64 logits), ``[N]`` or a scalar. NaN and +inf logits give NaN. Reruns are
        bit-identical.

    Raises:
        TypeError: a dtype is not supported, or a weight is no number.
        ValueError: shapes, weights or an option are wrong.
        LabelRangeError: a label lies outside ``[0, C)``.

    Example:
        >>> import torch, bdfast
        >>> logits = torch.tensor([[0.0, 0.0], [30.0, 0.0]], requires_grad=True)
        >>> loss = bdfast.ops.sce_loss(logits, torch.tensor([0, 0]))
        >>> loss.detach()  # ln 2 + 4 / 2, and 5 e^-30
        tensor([2.6931e+00, 4.6788e-13])
        >>> loss.sum().backward()
        >>> logits.grad
        tensor([[-1.5000e+00,  1.5000e+00], [-4.6788e-13,  4.6788e-13]])
    """
    validation.check_logits(NAME, logits)
    validation.check_target(NAME, target, logits)
    validation.check_choice(NAME, "reduction", reduction, REDUCTIONS)
    _check_weights(alpha, beta, log_zero, clamp)
    wish = requested(backend, NAME)
    function: Any = _SceLoss if clamp is None else _ClampedSceLoss
    options = (alpha, beta * -log_zero) if clamp is None else (alpha, beta, log_zero, clamp)
    if wants_gradient(NAME, logits):
        return cast(Tensor, apply(function, logits, target, *options, reduction, wish))
    op = FORWARD if clamp is None else CLAMPED_FORWARD
    return cast(Tensor, op(logits, target, *options, reduction, wish)[0])


class _SceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, alpha: float, reverse: float, reduction: str, backend: str
    ) -> Tensor:
        options = (alpha, reverse, reduction, backend)
        ctx.ahead = None
        if reduction != "none" and makes_gradient_ahead(logits, FORWARD, backend):
            loss, stats, ctx.ahead = FORWARD_WITH_GRADIENT(logits, target, *options)
        else:
            loss, stats = FORWARD(logits, target, *options)
        ctx.save_for_backward(logits, target, stats)
        ctx.options = options
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, ctx.ahead = ctx.ahead, None  # given away: a second backward of a retained graph makes its own
        if grad is None:
            grad = BACKWARD(grad_loss, *ctx.saved_tensors, *ctx.options)
        else:
            grad = scale_ahead_(grad, grad_loss)
        return grad, None, None, None, None, None


class _ClampedSceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, *options: Any) -> Tensor:
        loss, p = CLAMPED_FORWARD(logits, target, *options)
        ctx.save_for_backward(p, target)
        ctx.options = options
        ctx.dtype = logits.dtype
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad = CLAMPED_BACKWARD(grad_loss, *ctx.saved_tensors, *ctx.options)
        return grad.to(ctx.dtype), None, None, None, None, None, None, None


# --- reference: the equations in plain PyTorch -----------------------------------------------------------------------


def reference(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    alpha: float,
    reverse: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Loss, and the statistics ``[N, 2]`` of the classes ``j != y`` (maximum, sum of ``exp(z - maximum)``).

    ``reverse`` is ``beta |A|``.
    """
    validation.check_label_range(NAME, target, logits.shape[1])
    z = upcast(logits)
    m, s = other_classes(z, target)
    margin = margin_of(m, s, label_logit(z, target))
    rows = alpha * _softplus(margin) + reverse * _sigmoid(margin)
    return reduce_rows(rows, reduction), torch.stack((m, s), dim=1)


def reference_backward(
    grad_loss: Tensor,  # [N] or scalar
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    stats: Tensor,  # [N, 2]
    alpha: float,
    reverse: float,
    reduction: str,
) -> Tensor:
    """``dz_j = grad (alpha + reverse p_y) (1 - p_y) e_j``; ``e_y = -1``, elsewhere e is the softmax over ``j != y``."""
    z = upcast(logits)
    m, s = stats.unbind(dim=1)
    margin = margin_of(m, s, label_logit(z, target))
    weight = grad_loss.to(z.dtype) * (alpha + reverse * _sigmoid(-margin)) * _sigmoid(margin)
    weight = (weight / len(z) if reduction == "mean" else weight)[:, None]
    others = z.masked_fill(label_mask(z, target), -float("inf"))
    share = (others - m[:, None]).exp() / torch.where(s == 0, torch.ones_like(s), s)[:, None]
    return torch.where(label_mask(z, target), -weight, weight * share).to(logits.dtype)


def reference_with_gradient(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    alpha: float,
    reverse: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics, and the gradient for an incoming gradient of 1."""
    loss, stats = reference(logits, target, alpha, reverse, reduction)
    grad = reference_backward(torch.ones_like(loss), logits, target, stats, alpha, reverse, reduction)
    return loss, stats, grad


def _softplus(margin: Tensor) -> Tensor:
    """``log(1 + e^m)`` to the last bit of relative accuracy (PyTorch's own is linear beyond a threshold)."""
    return margin.clamp_min(0.0) + (-margin.abs()).exp().log1p()


def _sigmoid(margin: Tensor) -> Tensor:
    """Its definition: the last elements of PyTorch's own round differently, and which are last depends on threads."""
    return 1.0 / (1.0 + (-margin).exp())


def clamped_reference(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    alpha: float,
    beta: float,
    log_zero: float,
    clamp: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Loss of the usual formula, operation by operation, and the probabilities ``[N, C]`` before the clamp."""
    validation.check_label_range(NAME, target, logits.shape[1])
    z = upcast(logits)
    p = z.softmax(dim=1)
    log_q = torch.where(label_mask(z, target), 0.0, torch.full_like(z, log_zero))
    ce = -label_logit(F.log_softmax(z, dim=1), target)
    rce = -1 * torch.sum(p.clamp(clamp, 1.0) * log_q, dim=1)
    return reduce_rows(alpha * ce + beta * rce, reduction), p


def clamped_reference_backward(
    grad_loss: Tensor,  # [N] or scalar
    p: Tensor,  # [N, C]
    target: Tensor,  # [N]
    alpha: float,
    beta: float,
    log_zero: float,
    clamp: float,
    reduction: str,
) -> Tensor:
    """``dz = grad (alpha (p - q) + beta p (g - <g, p>))``, ``g_j = |A|`` at the other classes above the clamp."""
    label = label_mask(p, target)
    g = torch.where(label | (p < clamp), 0.0, torch.full_like(p, -log_zero))
    grad = alpha * (p - label.to(p.dtype)) + beta * p * (g - (g * p).sum(dim=1, keepdim=True))
    scale = grad_loss.to(p.dtype) / (len(p) if reduction == "mean" else 1)
    return scale.expand(len(p))[:, None] * grad


# --- compiled implementations ----------------------------------------------------------------------------------------


def _cpp(
    logits: Tensor, target: Tensor, alpha: float, reverse: float, reduction: str, grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    z, y = classes_contiguous(logits), target.contiguous()
    n, c = z.shape
    loss = torch.empty((n,) if reduction == "none" else (), dtype=torch.float32)
    stats = torch.empty((n, 2), dtype=torch.float32)
    outside = native().sce_loss_fwd(
        z.data_ptr(), DTYPE_CODE[z.dtype], n, c, z.stride(0), y.data_ptr(), alpha, reverse,
        REDUCTIONS.index(reduction), loss.data_ptr(), stats.data_ptr(), 0 if grad is None else grad.data_ptr(),
    )  # fmt: skip
    if outside >= 0:
        validation.raise_label_range(NAME, target, c, outside)
    return loss, stats


def _cpp_with_gradient(
    logits: Tensor, target: Tensor, alpha: float, reverse: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty(logits.shape, dtype=logits.dtype)
    return *_cpp(logits, target, alpha, reverse, reduction, grad), grad


def _cpp_backward(
    grad_loss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, alpha: float, reverse: float, reduction: str
) -> Tensor:
    z, y, g, s = classes_contiguous(logits), target.contiguous(), grad_loss.contiguous(), stats.contiguous()
    n, c = z.shape
    grad = torch.empty((n, c), dtype=z.dtype)
    native().sce_loss_bwd(
        z.data_ptr(), DTYPE_CODE[z.dtype], n, c, z.stride(0), y.data_ptr(), alpha, reverse,
        REDUCTIONS.index(reduction), g.data_ptr(), s.data_ptr(), grad.data_ptr(),
    )  # fmt: skip
    return grad


def _triton(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    from bdfast.triton_kernels import sce_loss as kernels

    validation.check_label_range(NAME, target, logits.shape[1])
    return kernels.forward(logits, target, *options)  # type: ignore[no-any-return]


def _triton_backward(*arguments: Any) -> Tensor:
    from bdfast.triton_kernels import sce_loss as kernels

    return kernels.backward(*arguments)  # type: ignore[no-any-return]


# --- registration ----------------------------------------------------------------------------------------------------


def _fake_loss(logits: Tensor, reduction: str) -> Tensor:
    return logits.new_empty((logits.shape[0],) if reduction == "none" else (), dtype=compute_dtype(logits))


def _fake(logits: Tensor, target: Tensor, alpha: float, reverse: float, reduction: str, backend: str) -> Any:
    return _fake_loss(logits, reduction), logits.new_empty((logits.shape[0], 2), dtype=compute_dtype(logits))


def _fake_with_gradient(logits: Tensor, *arguments: Any) -> Any:
    return *_fake(logits, *arguments), torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _fake_clamped(logits: Tensor, *options: Any) -> Any:
    return _fake_loss(logits, options[-2]), logits.new_empty(logits.shape, dtype=compute_dtype(logits))


def _fake_backward(grad_loss: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)


FORWARD = Op(
    name="sce_loss_fwd",
    public=NAME,
    schema="(Tensor logits, Tensor target, float alpha, float reverse, str reduction, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    key=lambda logits, *_: logits,
    implementations=(
        Implementation("cpp", _cpp, runs_cpp),
        Implementation("triton", _triton, runs_triton),
        Implementation("reference", reference, always),
    ),
)

FORWARD_WITH_GRADIENT = Op(
    name="sce_loss_fwd_grad",
    public=NAME,
    schema="(Tensor logits, Tensor target, float alpha, float reverse, str reduction, str backend) -> "
    "(Tensor, Tensor, Tensor)",
    fake=_fake_with_gradient,
    key=lambda logits, *_: logits,
    implementations=(
        Implementation("cpp", _cpp_with_gradient, runs_cpp),
        Implementation("reference", reference_with_gradient, always),
    ),
)

BACKWARD = Op(
    name="sce_loss_bwd",
    public=NAME,
    schema="(Tensor grad_loss, Tensor logits, Tensor target, Tensor stats, float alpha, float reverse, str reduction, "
    "str backend) -> Tensor",
    fake=_fake_backward,
    key=lambda grad_loss, logits, *_: logits,
    implementations=(
        Implementation("cpp", _cpp_backward, runs_cpp),
        Implementation("triton", _triton_backward, runs_triton),
        Implementation("reference", reference_backward, always),
    ),
)

CLAMPED_FORWARD = Op(
    name="sce_loss_clamped_fwd",
    public=NAME,
    schema="(Tensor logits, Tensor target, float alpha, float beta, float log_zero, float clamp, str reduction, "
    "str backend) -> (Tensor, Tensor)",
    fake=_fake_clamped,
    key=lambda logits, *_: logits,
    implementations=(Implementation("reference", clamped_reference, always),),
)

CLAMPED_BACKWARD = Op(
    name="sce_loss_clamped_bwd",
    public=NAME,
    schema="(Tensor grad_loss, Tensor p, Tensor target, float alpha, float beta, float log_zero, float clamp, "
    "str reduction, str backend) -> Tensor",
    fake=_fake_backward,
    key=lambda grad_loss, p, *_: p,
    implementations=(Implementation("reference", clamped_reference_backward, always),),
)


# --- validation ------------------------------------------------------------------------------------------------------


def _check_weights(alpha: float, beta: float, log_zero: float, clamp: float | None) -> None:
    for name, value in (("alpha", alpha), ("beta", beta), ("log_zero", log_zero), ("clamp", clamp)):
        if value is not None or name != "clamp":
            validation.check_number(NAME, name, value)  # type: ignore[arg-type]
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0.0 <= value < math.inf:
            raise ValueError(message(NAME, name, "a finite weight >= 0", str(value), "correct it"))
    if not -math.inf < log_zero < 0.0:
        raise ValueError(
            message(
                NAME, "log_zero", "a finite number below 0", str(log_zero), "pass what log 0 stands for, such as -4"
            )
        )
    if clamp is not None and not 0.0 < clamp < 1.0:
        raise ValueError(
            message(NAME, "clamp", "a probability in (0, 1), or None", str(clamp), "pass 1e-7 for parity, else None")
        )
