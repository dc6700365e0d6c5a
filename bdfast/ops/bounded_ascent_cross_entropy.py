r"""Descent on some rows and bounded ascent on the others: the loss of AdvrBD's backdoor enhancement.

.. math::

    \ell = \frac1{n_d} \sum_{i < n_d} \mathrm{CE}_i - \frac\mu{n_a} \sum_{i \ge n_d} \min(\mathrm{CE}_i, \tau), \qquad
    \frac{\partial \ell}{\partial z_i} = w_i (p_i - \mathrm{onehot}(y_i)), \quad
    w_i = \frac1{n_d}, \text{ or } -\frac\mu{n_a} [\mathrm{CE}_i < \tau]

This is eq. 4 of the AdvrBD paper (arXiv 2405.12719) over one concatenated batch; tau ends the ascent of a row that is
firmly misclassified, where the paper's would diverge. Rows are computed by the kernels of
:func:`bdfast.ops.hinge_cross_entropy`: one read of the logits forward, one read and one write backward.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdfast.backends import requested
from bdfast.errors import LabelRangeError, message
from bdfast.ops import validation
from bdfast.ops.hinge_cross_entropy import BACKWARD, FORWARD

NAME = "bounded_ascent_cross_entropy"
_NO_HINGE = -1.0  # every cross entropy lies above it: no row of the backward is at rest


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
        TypeError: a dtype is not supported, or ``num_descend`` is not an integer.
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
    if not 0.0 <= mu < float("inf"):
        raise ValueError(message(NAME, "mu", "a finite weight >= 0", str(mu), "correct it"))
    if not tau >= 0.0:
        raise ValueError(message(NAME, "tau", "a number of nats >= 0", str(tau), "pass 2 ln C, or inf"))
    apply = cast(Any, _BoundedAscentCrossEntropy.apply)  # torch does not annotate it
    return cast(Tensor, apply(logits, target, num_descend, mu, tau, requested(backend, NAME)))


class _BoundedAscentCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, num_descend: int, mu: float, tau: float, backend: str
    ) -> Tensor:
        ce, stats = _cross_entropy(logits, target, backend)
        ctx.save_for_backward(logits, target, stats, ce)
        ctx.options = (num_descend, mu, tau, backend)
        descend, ascend = ce[:num_descend], ce[num_descend:].clamp_max(tau)
        loss = descend.sum(dtype=torch.float64) / max(1, len(descend))
        return (loss - mu / max(1, len(ascend)) * ascend.sum(dtype=torch.float64)).to(ce.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, stats, ce = ctx.saved_tensors
        num_descend, mu, tau, backend = ctx.options
        ascending = -mu / max(1, len(ce) - num_descend)
        weight = torch.where(ce >= tau, 0.0, torch.full_like(ce, ascending))  # NaN is not at rest
        weight[:num_descend] = 1.0 / max(1, num_descend)
        grad = BACKWARD(grad_loss * weight, logits, target, stats, ce, _NO_HINGE, "none", "sample", backend)
        return grad, None, None, None, None, None


def _cross_entropy(logits: Tensor, target: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """CE ``[N]`` and the row statistics that the backward starts from: the hinge at margin 0."""
    arguments = (logits, target, 0.0, "none", "sample", backend)
    if torch.compiler.is_compiling():
        return cast("tuple[Tensor, Tensor]", FORWARD(*arguments))
    try:
        return cast("tuple[Tensor, Tensor]", FORWARD(*arguments))
    except LabelRangeError:
        validation.check_label_range(NAME, target, logits.shape[1])  # the same, under the name that was called
        raise


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
