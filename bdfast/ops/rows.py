"""What ops over the rows of ``[N, C]`` logits share."""

from __future__ import annotations

import torch
from torch import Tensor

from bdfast.backends import Op
from bdfast.backends.registry import is_plain
from bdfast.ops.precision import total

REDUCTIONS = ("none", "sum", "mean")  # their indices are enum Reduction in csrc/include/rows.h
DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum DType in csrc/include/dtype.h


def classes_contiguous(logits: Tensor) -> Tensor:
    """``logits`` with the classes of a row side by side; rows may lie any distance apart."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def label_mask(logits: Tensor, target: Tensor) -> Tensor:
    """``[N, C]`` bool, true at the label; a label out of range is nowhere."""
    return torch.arange(logits.shape[1], device=logits.device)[None, :] == target[:, None]


def label_logit(logits: Tensor, target: Tensor) -> Tensor:
    """``z_iy``, NaN where the label is out of range (which the CPU entry of an op has refused before)."""
    inside = (target >= 0) & (target < logits.shape[1])
    picked = logits.gather(1, target.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return torch.where(inside, picked, torch.full_like(picked, float("nan")))


def reduce_rows(rows: Tensor, reduction: str) -> Tensor:
    """One value a row, or their sum or mean, in float64 and then in the dtype of ``rows``."""
    if reduction == "none":
        return rows
    reduced = total(rows)
    return (reduced / len(rows) if reduction == "mean" else reduced).to(rows.dtype)


def makes_gradient_ahead(logits: Tensor, forward: Op, backend: str) -> bool:
    """Whether a forward makes the gradient, while the rows are in the cache: one read of the logits instead of two.

    On the CPU in float32, where the backward can look at the incoming gradient without waiting, and a product with it
    rounds no more than the gradient itself.
    """
    return (
        logits.is_cpu
        and logits.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and is_plain(logits)  # a tracer has no gradient to look at
        and forward.choose(backend, logits).backend == "cpp"
    )


def scale_ahead_(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """``grad``, made for an incoming gradient of 1, times the one that came, in place."""
    if (factor := grad_loss.item()) != 1.0:
        grad.mul_(factor)
    return grad
