r"""Descent on some rows and bounded ascent on the others: the loss of AdvrBD's backdoor enhancement.

.. math::

    \ell = \frac1{n_d} \sum_{i < n_d} \mathrm{CE}_i - \frac\mu{n_a} \sum_{i \ge n_d} \min(\mathrm{CE}_i, \tau), \qquad
    \frac{\partial \ell}{\partial z_i} = w_i (p_i - \mathrm{onehot}(y_i)), \quad
    w_i = \frac1{n_d}, \text{ or } -\frac\mu{n_a} [\mathrm{CE}_i < \tau]

This is eq. 4 of the AdvrBD paper (arXiv 2405.12719) over one concatenated batch; tau ends the ascent of a row that is
firmly misclassified, where the paper's would diverge. At equality with tau the gradient is 0. The least that has to
move is one read of the logits forward, one read and one write backward.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp, runs_triton
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.ops import validation
from bdfast.ops.autograd import apply, once_differentiable, wants_gradient
from bdfast.ops.precision import compute_dtype, total, upcast
from bdfast.ops.rows import (
    DTYPE_CODE,
    classes_contiguous,
    label_logit,
    label_mask,
    makes_gradient_ahead,
    scale_ahead_,
)

NAME = "bounded_ascent_cross_entropy"


def bounded_ascent_cross_entropy(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N] int64
    num_descend: int,
    *,
    mu: float,
    tau: float,
    backend: str = "auto",
) -> Tensor:
    """Mean CE of the first rows minus ``mu`` times the mean of ``min(CE, tau)`` of the others.

    Args:
        logits: ``[N, C]`` float32, float16, bfloat16 (row arithmetic in float32) or float64 (reference only).
        target: ``[N]`` int64 class labels in ``[0, C)``. A label out of range raises on the CPU; on a GPU it gives NaN
            and never reads outside the row (``with bdfast.debug():`` raises there too).
        num_descend: how many of the first rows descend, 0 to N; the others ascend. A part without rows adds 0.
        mu: weight of the ascent, >= 0.
        tau: nats, >= 0: a row whose loss has reached it ascends no further. ``2 ln C`` is firmly misclassified; ``inf``
            never stops.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        a scalar, float32 (float64 for float64 logits), differentiable in ``logits``; sums over rows are in float64. NaN
        logits give NaN. Reruns are bit-identical.

    Raises:
        TypeError: a dtype is not supported, ``num_descend`` is not an integer, or a weight is no number.
        ValueError: shapes or numbers are wrong.
        LabelRangeError: a label lies outside ``[0, C)``.

    Example:
        >>> import torch, bdfast
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-9.0, 0.0]], requires_grad=True)
        >>> target = torch.tensor([0, 0, 0])
        >>> loss = bdfast.ops.bounded_ascent_cross_entropy(logits, target, 1, mu=0.5, tau=4.0)
        >>> f"{loss.item():.4f}"  # ln 2 - 0.5 (ln 2 + 4) / 2
        '-0.4801'
        >>> loss.backward()
        >>> logits.grad[:2]  # down and up
        tensor([[-0.5000, 0.5000], [ 0.1250, -0.1250]])
        >>> logits.grad[2].any()  # at rest beyond tau
        tensor(False)
    """
    validation.check_logits(NAME, logits)
    validation.check_target(NAME, target, logits)
    num_descend = _check_count(num_descend, logits.shape[0])
    validation.check_number(NAME, "mu", mu)
    validation.check_number(NAME, "tau", tau, "pass 2 ln C, or inf")
    if not 0.0 <= mu < float("inf"):
        raise ValueError(message(NAME, "mu", "a finite weight >= 0", str(mu), "correct it"))
    if not tau >= 0.0:
        raise ValueError(message(NAME, "tau", "a number of nats >= 0", str(tau), "pass 2 ln C, or inf"))
    wish = requested(backend, NAME)
    if wants_gradient(NAME, logits):
        return cast(Tensor, apply(_BoundedAscentCrossEntropy, logits, target, num_descend, mu, tau, wish))
    return cast(Tensor, FORWARD(logits, target, num_descend, mu, tau, wish)[0])


class _BoundedAscentCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, num_descend: int, mu: float, tau: float, backend: str
    ) -> Tensor:
        options = (num_descend, mu, tau, backend)
        ctx.ahead = None
        if makes_gradient_ahead(logits, FORWARD, backend):
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


# --- reference: the equations in plain PyTorch -----------------------------------------------------------------------


def reference(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    num_descend: int,
    mu: float,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """Loss, and the row statistics ``[N, 2]`` (maximum, sum of ``exp(z - maximum)``) that the backward starts from."""
    validation.check_label_range(NAME, target, logits.shape[1])
    z = upcast(logits)
    m = z.amax(dim=1)
    stats = torch.stack((m, (z - m[:, None]).exp().sum(dim=1)), dim=1)
    ce = _cross_entropy(z, target, stats)
    descend, ascend = (total(part) for part in (ce[:num_descend], ce[num_descend:].clamp_max(tau)))
    down, up = _weights(len(z), num_descend, mu)
    return (down * descend + up * ascend).to(z.dtype), stats


def reference_backward(
    grad_loss: Tensor,  # scalar
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    stats: Tensor,  # [N, 2]
    num_descend: int,
    mu: float,
    tau: float,
) -> Tensor:
    """``dz_ij = grad w_i (softmax_ij - [j = y_i])``; rows at rest are exactly 0."""
    z = upcast(logits)
    m, s = stats.unbind(dim=1)
    down, up = _weights(len(z), num_descend, mu)
    descends = torch.arange(len(z), device=z.device) < num_descend
    active = descends | ~(_cross_entropy(z, target, stats) >= tau)  # NaN is not at rest
    weight = grad_loss.to(z.dtype) * torch.where(descends, z.new_full((), down), z.new_full((), up))
    p = (z - m[:, None]).exp() / s[:, None]
    grad = weight[:, None] * (p - label_mask(z, target).to(z.dtype))
    return torch.where(active[:, None], grad, torch.zeros_like(grad)).to(logits.dtype)


def reference_with_gradient(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, row statistics, and the gradient for an incoming gradient of 1."""
    loss, stats = reference(logits, target, *options)
    return loss, stats, reference_backward(torch.ones_like(loss), logits, target, stats, *options)


def _cross_entropy(z: Tensor, target: Tensor, stats: Tensor) -> Tensor:
    m, s = stats.unbind(dim=1)
    return (m - label_logit(z, target)) + s.log()


def _weights(rows: int, num_descend: int, mu: float) -> tuple[float, float]:
    """Of the CE of a row that descends, and of one that ascends."""
    return 1.0 / max(1, num_descend), -mu / max(1, rows - num_descend)


# --- compiled implementations ----------------------------------------------------------------------------------------


def _cpp(
    logits: Tensor, target: Tensor, num_descend: int, mu: float, tau: float, grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    z, y = classes_contiguous(logits), target.contiguous()
    n, c = z.shape
    loss = torch.empty((), dtype=torch.float32)
    stats = torch.empty((n, 2), dtype=torch.float32)
    outside = native().bounded_ascent_cross_entropy_fwd(
        z.data_ptr(), DTYPE_CODE[z.dtype], n, c, z.stride(0), y.data_ptr(), num_descend, mu, tau,
        loss.data_ptr(), stats.data_ptr(), 0 if grad is None else grad.data_ptr(),
    )  # fmt: skip
    if outside >= 0:
        validation.raise_label_range(NAME, target, c, outside)
    return loss, stats


def _cpp_with_gradient(
    logits: Tensor, target: Tensor, num_descend: int, mu: float, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty(logits.shape, dtype=logits.dtype)
    return *_cpp(logits, target, num_descend, mu, tau, grad), grad


def _cpp_backward(
    grad_loss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, num_descend: int, mu: float, tau: float
) -> Tensor:
    z, y = classes_contiguous(logits), target.contiguous()
    n, c = z.shape
    grad = torch.empty((n, c), dtype=z.dtype)
    native().bounded_ascent_cross_entropy_bwd(
        z.data_ptr(), DTYPE_CODE[z.dtype], n, c, z.stride(0), y.data_ptr(), num_descend, mu, tau,
        grad_loss.data_ptr(), stats.data_ptr(), grad.data_ptr(),
    )  # fmt: skip
    return grad


def _triton(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    from bdfast.triton_kernels import bounded_ascent_cross_entropy as kernels

    validation.check_label_range(NAME, target, logits.shape[1])
    return kernels.forward(logits, target, *options)  # type: ignore[no-any-return]


def _triton_backward(*arguments: Any) -> Tensor:
    from bdfast.triton_kernels import bounded_ascent_cross_entropy as kernels

    return kernels.backward(*arguments)  # type: ignore[no-any-return]


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logits)
    return logits.new_empty((), dtype=dtype), logits.new_empty((logits.shape[0], 2), dtype=dtype)


def _fake_gradient(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


_OPTIONS = "int num_descend, float mu, float tau, str backend"

FORWARD = Op(
    name="bounded_ascent_cross_entropy_fwd",
    public=NAME,
    schema=f"(Tensor logits, Tensor target, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake,
    key=lambda logits, *_: logits,
    implementations=(
        Implementation("cpp", _cpp, runs_cpp),
        Implementation("triton", _triton, runs_triton),
        Implementation("reference", reference, always),
    ),
)

FORWARD_WITH_GRADIENT = Op(
    name="bounded_ascent_cross_entropy_fwd_grad",
    public=NAME,
    schema=f"(Tensor logits, Tensor target, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=lambda logits, *_: (*_fake(logits), _fake_gradient(logits)),
    key=lambda logits, *_: logits,
    implementations=(
        Implementation("cpp", _cpp_with_gradient, runs_cpp),
        Implementation("reference", reference_with_gradient, always),
    ),
)

BACKWARD = Op(
    name="bounded_ascent_cross_entropy_bwd",
    public=NAME,
    schema=f"(Tensor grad_loss, Tensor logits, Tensor target, Tensor stats, {_OPTIONS}) -> Tensor",
    fake=lambda grad_loss, logits, *_: _fake_gradient(logits),
    key=lambda grad_loss, logits, *_: logits,
    implementations=(
        Implementation("cpp", _cpp_backward, runs_cpp),
        Implementation("triton", _triton_backward, runs_triton),
        Implementation("reference", reference_backward, always),
    ),
)


# --- validation ------------------------------------------------------------------------------------------------------


def _check_count(num_descend: int, rows: int) -> int:
    try:
        count = operator.index(num_descend)
    except TypeError:
        got = type(num_descend).__name__
        raise TypeError(message(NAME, "num_descend", "an integer", got, "pass the number of rows")) from None
    if not 0 <= count <= rows:
        raise ValueError(
            message(NAME, "num_descend", f"0 to {rows} rows", str(count), "pass the rows of the first part")
        )
    return count
