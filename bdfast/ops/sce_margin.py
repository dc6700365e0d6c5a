r"""Keys that order samples as symmetric cross entropy does, without its ties.

.. math::

    m_i = \log\sum_{j \ne y_i} e^{z_{ij}} - z_{iy_i}, \qquad
    \mathrm{CE}_i = \log(1 + e^{m_i}), \quad \mathrm{RCE}_i = |A| \,/\, (1 + e^{-m_i})

Both terms of SCE (Wang et al., ICCV 2019; step 1 of PAD-FT, arXiv 2409.12072) grow with :math:`m`, so that sorting by
it sorts by SCE for all positive weights. Float32 SCE is 0 for every row with :math:`m < -17` or so, and near-constant
for wrong ones; :math:`m` keeps telling them apart. The least that has to move is one read of the logits.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp, runs_triton
from bdfast.backends.registry import always
from bdfast.ops import validation
from bdfast.ops.precision import compute_dtype, upcast
from bdfast.ops.rows import DTYPE_CODE, classes_contiguous, label_logit, label_mask

NAME = "sce_margin"


def sce_margin(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N] int64
    *,
    backend: str = "auto",
) -> Tensor:
    """How far the other classes outweigh the label, ``logsumexp(z_j, j != y) - z_y``: the smaller, the cleaner.

    Args:
        logits: ``[N, C]`` float32, float16, bfloat16 (row arithmetic in float32) or float64 (reference only).
        target: ``[N]`` int64 class labels in ``[0, C)``. A label out of range raises on the CPU; on a GPU it gives NaN
            for its row and never reads outside the row (``with bdfast.debug():`` raises there too).
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        ``[N]`` float32 (float64 for float64 logits), not differentiable. A row with a NaN or infinite logit is not
        trusted: +Inf. A single class has no other class to outweigh it: -Inf.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes are wrong.
        LabelRangeError: a label lies outside ``[0, C)``.

    Example:
        >>> import torch, bdfast
        >>> logits = torch.tensor([[40.0, 0.0, 0.0], [50.0, 0.0, 0.0], [0.0, 3.0, 3.0]])
        >>> target = torch.tensor([0, 0, 0])
        >>> bdfast.ops.sce_margin(logits, target)
        tensor([-39.3069, -49.3069, 3.6931])
        >>> ce = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        >>> ce[0] == ce[1]  # a tie that sorting by margin does not have
        tensor(True)
    """
    validation.check_logits(NAME, logits)
    validation.check_target(NAME, target, logits)
    return cast(Tensor, MARGIN(logits.detach(), target, requested(backend, NAME)))


# --- reference: the equations in plain PyTorch -----------------------------------------------------------------------


def reference(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
) -> Tensor:
    """The margin of each row; +Inf where a logit is not finite."""
    validation.check_label_range(NAME, target, logits.shape[1])
    z = upcast(logits)
    margin = margin_of(*other_classes(z, target), label_logit(z, target))
    return torch.where(z.isfinite().all(dim=1), margin, torch.full_like(margin, float("inf")))


def other_classes(
    z: Tensor,  # [N, C]
    target: Tensor,  # [N]
) -> tuple[Tensor, Tensor]:
    """``[N]`` each: maximum m and sum of ``exp(z - m)`` over ``j != y``; m is 0 where that leaves nothing but -inf."""
    others = z.masked_fill(label_mask(z, target), -float("inf"))
    m = others.amax(dim=1)
    m = torch.where(m == -float("inf"), torch.zeros_like(m), m)
    return m, (others - m[:, None]).exp().sum(dim=1)


def margin_of(
    m: Tensor,  # [N]
    s: Tensor,  # [N]
    label: Tensor,  # [N], z_y
) -> Tensor:
    """``m + log s - z_y``; NaN where ``z_y`` is +inf, as the softmax is."""
    margin = (m - label) + s.log()
    return torch.where(label == float("inf"), torch.full_like(margin, float("nan")), margin)


# --- compiled implementations ----------------------------------------------------------------------------------------


def _cpp(logits: Tensor, target: Tensor) -> Tensor:
    z, y = classes_contiguous(logits), target.contiguous()
    n, c = z.shape
    margin = torch.empty(n, dtype=torch.float32)
    outside = native().sce_margin(z.data_ptr(), DTYPE_CODE[z.dtype], n, c, z.stride(0), y.data_ptr(), margin.data_ptr())
    if outside >= 0:
        validation.raise_label_range(NAME, target, c, outside)
    return margin


def _triton(logits: Tensor, target: Tensor) -> Tensor:
    from bdfast.triton_kernels import sce_margin as kernels

    validation.check_label_range(NAME, target, logits.shape[1])
    return kernels.forward(logits, target)  # type: ignore[no-any-return]


def _fake(logits: Tensor, *_: Any) -> Tensor:
    dtype = compute_dtype(logits)
    return logits.new_empty((logits.shape[0],), dtype=dtype)


MARGIN = Op(
    name="sce_margin",
    public=NAME,
    schema="(Tensor logits, Tensor target, str backend) -> Tensor",
    fake=_fake,
    key=lambda logits, *_: logits,
    implementations=(
        Implementation("cpp", _cpp, runs_cpp),
        Implementation("triton", _triton, runs_triton),
        Implementation("reference", reference, always),
    ),
)
