r"""Hinged cross entropy, the data term of D3: only the loss above a tolerated level counts.

.. math::

    \mathrm{CE}_i = \log\sum_j e^{z_{ij}} - z_{iy_i}, \qquad
    \ell = \tfrac1N \sum_i \max(0, \mathrm{CE}_i - \epsilon) \quad\text{or}\quad
    \ell = \max\bigl(0, \tfrac1N \sum_i \mathrm{CE}_i - \epsilon\bigr)

The first form (``hinge="sample"``) is that of the D3 authors' release, the second (``hinge="batch"``) is eq. 4 of the
paper (arXiv 2411.09585). At equality the gradient is 0. The least that has to move is one read of the logits forward,
one read and one write backward.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
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

NAME = "hinge_cross_entropy"
HINGES = ("sample", "batch")


def hinge_cross_entropy(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N] int64
    margin: float,
    reduction: Literal["none", "sum", "mean"] = "mean",
    hinge: Literal["sample", "batch"] = "sample",
    *,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy above a tolerated level: ``max(0, CE - margin)``, differentiable in ``logits``.

    Args:
        logits: ``[N, C]`` float32, float16, bfloat16 (row arithmetic in float32) or float64 (reference only).
        target: ``[N]`` int64 class labels in ``[0, C)``. A label out of range raises on the CPU; on a GPU it gives NaN
            for its row and never reads outside the row (``with bdfast.debug():`` raises there too).
        margin: the loss that is tolerated, in nats, >= 0 (eps in the D3 paper).
        reduction: ``"none"`` gives ``[N]``, ``"sum"`` and ``"mean"`` a scalar, summed over rows in float64. The mean of
            an empty batch is NaN.
        hinge: ``"sample"`` hinges every row; ``"batch"`` hinges the mean, and needs ``reduction="mean"``.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        float32 (float64 for float64 logits), ``[N]`` or a scalar. NaN logits give NaN. Reruns are bit-identical.

    Raises:
        TypeError: a dtype is not supported, or margin is no number.
        ValueError: shapes, margin or an option are wrong.
        LabelRangeError: a label lies outside ``[0, C)``.

    Example:
        >>> import torch, bdfast
        >>> logits = torch.tensor([[4.0, 0.0], [0.0, 0.0]], requires_grad=True)
        >>> loss = bdfast.ops.hinge_cross_entropy(logits, torch.tensor([0, 1]), 0.1)
        >>> loss.backward()
        >>> f"{loss.item():.4f}"  # the first row is under the margin: only the second counts
        '0.2966'
        >>> logits.grad
        tensor([[ 0.0000,  0.0000], [ 0.2500, -0.2500]])
    """
    validation.check_logits(NAME, logits)
    validation.check_target(NAME, target, logits)
    validation.check_choice(NAME, "reduction", reduction, REDUCTIONS)
    validation.check_choice(NAME, "hinge", hinge, HINGES)
    validation.check_number(NAME, "margin", margin, "pass D3's eps")
    if not 0.0 <= margin < float("inf"):
        raise ValueError(message(NAME, "margin", "a finite number of nats >= 0", str(margin), "pass D3's eps"))
    if hinge == "batch" and reduction != "mean":
        raise ValueError(
            message(NAME, "reduction", '"mean" with hinge="batch"', repr(reduction), "a hinged mean is one number")
        )
    wish = requested(backend, NAME)
    if wants_gradient(NAME, logits):
        return cast(Tensor, apply(_HingeCrossEntropy, logits, target, margin, reduction, hinge, wish))
    return cast(Tensor, FORWARD(logits, target, margin, reduction, hinge, wish)[0])


class _HingeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, margin: float, reduction: str, hinge: str, backend: str
    ) -> Tensor:
        options = (margin, reduction, hinge, backend)
        ctx.ahead = None
        if reduction != "none" and hinge == "sample" and makes_gradient_ahead(logits, FORWARD, backend):
            loss, stats, ctx.ahead = FORWARD_WITH_GRADIENT(logits, target, margin, reduction, backend)
        else:
            loss, stats = FORWARD(logits, target, *options)
        ctx.save_for_backward(logits, target, stats, loss)
        ctx.options = options
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, ctx.ahead = ctx.ahead, None  # given away: a second backward of a retained graph makes its own
        if grad is None:
            logits, target, stats, loss = ctx.saved_tensors
            grad = BACKWARD(grad_loss, logits, target, stats, loss, *ctx.options)
        else:
            grad = scale_ahead_(grad, grad_loss)
        return grad, None, None, None, None, None


# --- reference: the equations in plain PyTorch -----------------------------------------------------------------------


def reference(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    margin: float,
    reduction: str,
    hinge: str,
) -> tuple[Tensor, Tensor]:
    """Loss, and the row statistics ``[N, 2]`` (maximum, sum of ``exp(z - maximum)``) that the backward starts from."""
    validation.check_label_range(NAME, target, logits.shape[1])
    z = upcast(logits)
    m = z.amax(dim=1)
    s = (z - m[:, None]).exp().sum(dim=1)
    ce = (m - label_logit(z, target)) + s.log()
    rows = _hinge(ce, margin) if hinge == "sample" else ce
    reduced = reduce_rows(rows, reduction)
    return (_hinge(reduced, margin) if hinge == "batch" else reduced), torch.stack((m, s), dim=1)


def reference_backward(
    grad_loss: Tensor,  # [N] or scalar
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    stats: Tensor,  # [N, 2]
    loss: Tensor,  # [N] or scalar
    margin: float,
    reduction: str,
    hinge: str,
) -> Tensor:
    """``dz_ij = grad_i [active_i] (softmax_ij - [j = y_i])``; inactive rows are exactly 0."""
    z = upcast(logits)
    m, s = stats.unbind(dim=1)
    ce = (m - label_logit(z, target)) + s.log()
    active = ~(ce <= margin) if hinge == "sample" else (~(loss <= 0)).expand(len(z))
    scale = grad_loss.to(z.dtype) / (len(z) if reduction == "mean" else 1)
    p = (z - m[:, None]).exp() / s[:, None]
    grad = scale.expand(len(z))[:, None] * (p - label_mask(z, target).to(z.dtype))
    return torch.where(active[:, None], grad, torch.zeros_like(grad)).to(logits.dtype)


def reference_with_gradient(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    margin: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, row statistics, and the gradient for an incoming gradient of 1."""
    loss, stats = reference(logits, target, margin, reduction, "sample")
    grad = reference_backward(torch.ones_like(loss), logits, target, stats, loss, margin, reduction, "sample")
    return loss, stats, grad


def _hinge(ce: Tensor, margin: float) -> Tensor:
    return torch.where(ce <= margin, torch.zeros_like(ce), ce - margin)  # NaN is not masked


# --- compiled implementations ----------------------------------------------------------------------------------------


def _fake(logits: Tensor, target: Tensor, margin: float, reduction: str, hinge: str, backend: str) -> Any:
    dtype = compute_dtype(logits)
    loss = logits.new_empty((logits.shape[0],) if reduction == "none" else (), dtype=dtype)
    return loss, logits.new_empty((logits.shape[0], 2), dtype=dtype)


def _cpp(
    logits: Tensor, target: Tensor, margin: float, reduction: str, hinge: str, grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    z, y = classes_contiguous(logits), target.contiguous()
    n, c = z.shape
    loss = torch.empty((n,) if reduction == "none" else (), dtype=torch.float32)
    stats = torch.empty((n, 2), dtype=torch.float32)
    outside = native().hinge_cross_entropy_fwd(
        z.data_ptr(), DTYPE_CODE[z.dtype], n, c, z.stride(0), y.data_ptr(), margin, hinge == "batch",
        REDUCTIONS.index(reduction), loss.data_ptr(), stats.data_ptr(), 0 if grad is None else grad.data_ptr(),
    )  # fmt: skip
    if outside >= 0:
        validation.raise_label_range(NAME, target, c, outside)
    return loss, stats


def _cpp_with_gradient(logits: Tensor, target: Tensor, margin: float, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty(logits.shape, dtype=logits.dtype)
    return *_cpp(logits, target, margin, reduction, "sample", grad), grad


def _cpp_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    loss: Tensor,
    margin: float,
    reduction: str,
    hinge: str,
) -> Tensor:
    z, y, g = classes_contiguous(logits), target.contiguous(), grad_loss.contiguous()
    n, c = z.shape
    grad = torch.empty((n, c), dtype=z.dtype)
    native().hinge_cross_entropy_bwd(
        z.data_ptr(), DTYPE_CODE[z.dtype], n, c, z.stride(0), y.data_ptr(), margin, hinge == "batch",
        REDUCTIONS.index(reduction), g.data_ptr(), loss.data_ptr(), stats.data_ptr(), grad.data_ptr(),
    )  # fmt: skip
    return grad


def _triton(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    from bdfast.triton_kernels import hinge_cross_entropy as kernels

    validation.check_label_range(NAME, target, logits.shape[1])
    return kernels.forward(logits, target, *options)  # type: ignore[no-any-return]


def _triton_backward(*arguments: Any) -> Tensor:
    from bdfast.triton_kernels import hinge_cross_entropy as kernels

    return kernels.backward(*arguments)  # type: ignore[no-any-return]


def _fake_with_gradient(logits: Tensor, target: Tensor, margin: float, reduction: str, backend: str) -> Any:
    loss, stats = _fake(logits, target, margin, reduction, "sample", backend)
    return loss, stats, torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _fake_backward(grad_loss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


FORWARD = Op(
    name="hinge_cross_entropy_fwd",
    public=NAME,
    schema="(Tensor logits, Tensor target, float margin, str reduction, str hinge, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    key=lambda logits, *_: logits,
    implementations=(
        Implementation("cpp", _cpp, runs_cpp),
        Implementation("triton", _triton, runs_triton),
        Implementation("reference", reference, always),
    ),
)

FORWARD_WITH_GRADIENT = Op(
    name="hinge_cross_entropy_fwd_grad",
    public=NAME,
    schema="(Tensor logits, Tensor target, float margin, str reduction, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_with_gradient,
    key=lambda logits, *_: logits,
    implementations=(
        Implementation("cpp", _cpp_with_gradient, runs_cpp),
        Implementation("reference", reference_with_gradient, always),
    ),
)

BACKWARD = Op(
    name="hinge_cross_entropy_bwd",
    public=NAME,
    schema="(Tensor grad_loss, Tensor logits, Tensor target, Tensor stats, Tensor loss, float margin, str reduction, "
    "str hinge, str backend) -> Tensor",
    fake=_fake_backward,
    key=lambda grad_loss, logits, *_: logits,
    implementations=(
        Implementation("cpp", _cpp_backward, runs_cpp),
        Implementation("triton", _triton_backward, runs_triton),
        Implementation("reference", reference_backward, always),
    ),
)
