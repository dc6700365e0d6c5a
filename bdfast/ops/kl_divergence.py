r"""Kullback-Leibler divergence of two rows of logits, exact also for rows that nearly agree.

.. math::

    \mathrm{KL}_i = \sum_j p_{ij} d_{ij}, \qquad d_{ij} = \log p_{ij} - \log q_{ij}, \qquad
    p = \mathrm{softmax}(z^p), \quad q = \mathrm{softmax}(z^q)

    \frac{\partial\,\mathrm{KL}_i}{\partial z^q_{ij}} = q_{ij} - p_{ij}, \qquad
    \frac{\partial\,\mathrm{KL}_i}{\partial z^p_{ij}} = p_{ij} (d_{ij} - \mathrm{KL}_i)

This is the consistency score of AdvrBD (eq. 3 of arXiv 2405.12719) and, through its gradient, the objective of the
perturbation. Since p and q both sum to 1, a row is summed as :math:`\sum_j p_{ij} (d_{ij} - 1) + q_{ij}` instead: terms
that are at least 0, each by a series where it is small. So nothing cancels, where the plain sum is noise of 1e-7 for
rows that differ by less than 1e-3. The least that has to move is one read of both rows forward, and one read of both
and one write of each gradient that is wanted backward.
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
from bdfast.ops.rows import DTYPE_CODE, REDUCTIONS, classes_contiguous, reduce_rows

NAME = "kl_divergence"


def kl_divergence(
    logits_p: Tensor,  # [N, C]
    logits_q: Tensor,  # [N, C]
    reduction: Literal["none", "sum", "mean"] = "none",
    *,
    backend: str = "auto",
) -> Tensor:
    """KL(softmax p || softmax q) of each row, >= 0, differentiable in both.

    Args:
        logits_p: ``[N, C]`` float32, float16, bfloat16 (row arithmetic in float32) or float64 (reference only).
        logits_q: the same shape, dtype and device.
        reduction: ``"none"`` gives ``[N]``, ``"sum"`` and ``"mean"`` (over rows) a scalar, summed in float64. The mean
            of an empty batch is NaN.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        float32 (float64 for float64 logits), ``[N]`` or a scalar, in nats. A class with p = 0 (-inf logits included)
        adds nothing, one with q = 0 < p makes the row +Inf. NaN, +Inf or nothing but -Inf in either row gives NaN.
        Reruns are bit-identical.

    Raises:
        TypeError: a dtype is not supported, or they differ.
        ValueError: shapes or devices differ, or an option is wrong.

    Example:
        >>> import torch, bdfast
        >>> p = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> q = torch.tensor([[0.0, 0.0], [0.002, 0.0]], requires_grad=True)
        >>> kl = bdfast.ops.kl_divergence(p, q)
        >>> kl.detach()  # the plain sum gives 5.4e-07 for the second row
        tensor([1.1094e-01, 5.0000e-07])
        >>> kl.sum().backward()
        >>> q.grad  # q - p
        tensor([[-0.2311, 0.2311], [ 0.0005, -0.0005]])
    """
    _check(logits_p, logits_q)
    validation.check_choice(NAME, "reduction", reduction, REDUCTIONS)
    wish = requested(backend, NAME)
    if wants_gradient(NAME, logits_p, logits_q):
        return cast(Tensor, apply(_KlDivergence, logits_p, logits_q, reduction, wish))
    return cast(Tensor, FORWARD(logits_p, logits_q, reduction, False, wish)[0])


class _KlDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_p: Tensor, logits_q: Tensor, reduction: str, backend: str) -> Tensor:
        loss, stats = FORWARD(logits_p, logits_q, reduction, True, backend)
        ctx.save_for_backward(logits_p, logits_q, stats)
        ctx.options = (reduction, backend)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        reduction, backend = ctx.options
        wants_p, wants_q = ctx.needs_input_grad[:2]
        grad_p, grad_q = BACKWARD(grad_loss, *ctx.saved_tensors, reduction, wants_p, wants_q, backend)
        return grad_p if wants_p else None, grad_q if wants_q else None, None, None


# --- reference: the equations in plain PyTorch -----------------------------------------------------------------------


def reference(
    logits_p: Tensor,  # [N, C]
    logits_q: Tensor,  # [N, C]
    reduction: str,
    keep_stats: bool,
) -> tuple[Tensor, Tensor]:
    """Loss, and what the backward starts from if it is wanted: ``[N, 5]``, (maximum, sum of ``exp(z - maximum)``) of p
    and of q, and KL; else ``[0, 5]``.
    """
    z_p, z_q = upcast(logits_p), upcast(logits_q)
    stats = torch.cat((_row_stats(z_p), _row_stats(z_q)), dim=1)
    rows = _terms(*_softmax_pair(z_p, z_q, stats)).sum(dim=1)
    stats = torch.cat((stats, rows[:, None]), dim=1)
    return reduce_rows(rows, reduction), stats if keep_stats else stats[:0].clone()


def reference_backward(
    grad_loss: Tensor,  # [N] or scalar
    logits_p: Tensor,  # [N, C]
    logits_q: Tensor,  # [N, C]
    stats: Tensor,  # [N, 5]
    reduction: str,
    wants_p: bool,
    wants_q: bool,
) -> tuple[Tensor, Tensor]:
    """``(p (d - KL), q - p)`` times the incoming gradient; ``[0, C]`` for one that is not wanted."""
    p, q, d = _softmax_pair(upcast(logits_p), upcast(logits_q), stats)
    kl, n = stats[:, 4:], len(stats)
    scale = (grad_loss.to(p.dtype) / (n if reduction == "mean" else 1)).expand(n)[:, None]
    grad_p = scale * torch.where(p == 0, 0.0 * kl, p * (d - kl))  # 0 * kl: NaN where KL is not finite
    grad_q = scale * (q - p)
    wanted_p, wanted_q = (grad[: n if wants else 0] for grad, wants in ((grad_p, wants_p), (grad_q, wants_q)))
    return wanted_p.to(logits_p.dtype, copy=True), wanted_q.to(logits_q.dtype, copy=True)


def _row_stats(z: Tensor) -> Tensor:
    m = z.amax(dim=1, keepdim=True)
    return torch.cat((m, (z - m).exp().sum(dim=1, keepdim=True)), dim=1)


def _softmax_pair(z_p: Tensor, z_q: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and d = log p - log q, ``[N, C]`` each."""
    max_p, sum_p, max_q, sum_q = stats[:, :4, None].unbind(dim=1)
    below_p, below_q = z_p - max_p, z_q - max_q
    return below_p.exp() / sum_p, below_q.exp() / sum_q, (below_p - below_q) - (sum_p.log() - sum_q.log())


def _terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """``p (d - 1) + q = p (d + exp(-d) - 1) >= 0``, without its cancellation near d = 0; q where p = 0."""
    near = d.clamp(-1.0, 1.0)
    series = torch.ones_like(near)
    for n in range(20, 2, -1):  # d + exp(-d) - 1 = d^2 / 2 (1 - d / 3 (1 - d / 4 (...)))
        series = 1.0 - near / n * series
    terms = torch.where(d.abs() < 1.0, p * near.square() / 2.0 * series, p * (d - 1.0) + q)
    return torch.where(p == 0.0, q, terms)


# --- compiled implementations ----------------------------------------------------------------------------------------


def _cpp(logits_p: Tensor, logits_q: Tensor, reduction: str, keep_stats: bool) -> tuple[Tensor, Tensor]:
    p, q = classes_contiguous(logits_p), classes_contiguous(logits_q)
    n, c = p.shape
    loss = torch.empty((n,) if reduction == "none" else (), dtype=torch.float32)
    stats = torch.empty((n if keep_stats else 0, 5), dtype=torch.float32)
    native().kl_divergence_fwd(
        p.data_ptr(), q.data_ptr(), DTYPE_CODE[p.dtype], n, c, p.stride(0), q.stride(0),
        REDUCTIONS.index(reduction), loss.data_ptr(), stats.data_ptr() if keep_stats else 0,
    )  # fmt: skip
    return loss, stats


def _cpp_backward(
    grad_loss: Tensor,
    logits_p: Tensor,
    logits_q: Tensor,
    stats: Tensor,
    reduction: str,
    wants_p: bool,
    wants_q: bool,
) -> tuple[Tensor, Tensor]:
    p, q, g, s = classes_contiguous(logits_p), classes_contiguous(logits_q), grad_loss.contiguous(), stats.contiguous()
    n, c = p.shape
    grad_p, grad_q = _gradients(p, wants_p, wants_q)
    native().kl_divergence_bwd(
        p.data_ptr(), q.data_ptr(), DTYPE_CODE[p.dtype], n, c, p.stride(0), q.stride(0), REDUCTIONS.index(reduction),
        g.data_ptr(), s.data_ptr(), grad_p.data_ptr() if wants_p else 0, grad_q.data_ptr() if wants_q else 0,
    )  # fmt: skip
    return grad_p, grad_q


def _gradients(logits: Tensor, wants_p: bool, wants_q: bool) -> tuple[Tensor, Tensor]:
    n, c = logits.shape
    return logits.new_empty((n if wants_p else 0, c)), logits.new_empty((n if wants_q else 0, c))


def _triton(logits_p: Tensor, logits_q: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    from bdfast.triton_kernels import kl_divergence as kernels

    return kernels.forward(logits_p, logits_q, *options)  # type: ignore[no-any-return]


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from bdfast.triton_kernels import kl_divergence as kernels

    return kernels.backward(*arguments)  # type: ignore[no-any-return]


def _fake(logits_p: Tensor, logits_q: Tensor, reduction: str, keep_stats: bool, backend: str) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logits_p)
    n = logits_p.shape[0]
    loss = logits_p.new_empty((n,) if reduction == "none" else (), dtype=dtype)
    return loss, logits_p.new_empty((n if keep_stats else 0, 5), dtype=dtype)


def _fake_backward(
    grad_loss: Tensor,
    logits_p: Tensor,
    logits_q: Tensor,
    stats: Tensor,
    reduction: str,
    wants_p: bool,
    wants_q: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _gradients(logits_p, wants_p, wants_q)


FORWARD = Op(
    name="kl_divergence_fwd",
    public=NAME,
    schema="(Tensor logits_p, Tensor logits_q, str reduction, bool keep_stats, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    key=lambda logits_p, *_: logits_p,
    implementations=(
        Implementation("cpp", _cpp, runs_cpp),
        Implementation("triton", _triton, runs_triton),
        Implementation("reference", reference, always),
    ),
)

BACKWARD = Op(
    name="kl_divergence_bwd",
    public=NAME,
    schema="(Tensor grad_loss, Tensor logits_p, Tensor logits_q, Tensor stats, str reduction, bool wants_p, "
    "bool wants_q, str backend) -> (Tensor, Tensor)",
    fake=_fake_backward,
    key=lambda grad_loss, logits_p, *_: logits_p,
    implementations=(
        Implementation("cpp", _cpp_backward, runs_cpp),
        Implementation("triton", _triton_backward, runs_triton),
        Implementation("reference", reference_backward, always),
    ),
)


# --- validation ------------------------------------------------------------------------------------------------------


def _check(logits_p: Tensor, logits_q: Tensor) -> None:
    validation.check_logits(NAME, logits_p, "logits_p")
    validation.check_logits(NAME, logits_q, "logits_q")
    for what, p, q, remedy in (
        ("shape", list(logits_p.shape), list(logits_q.shape), "pass logits of the same samples and classes"),
        ("dtype", logits_p.dtype, logits_q.dtype, "convert one, such as with .float()"),
        ("device", logits_p.device, logits_q.device, "move it there"),
    ):
        if p != q:
            kind = TypeError if what == "dtype" else ValueError
            raise kind(message(NAME, "logits_q", f"the {what} of logits_p, {p}", str(q), remedy))
