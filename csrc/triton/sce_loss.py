"""sce_loss on the GPU: the loss in one read of the logits, the gradient in one more read and one write.

The equations, and what the outputs mean, are in ``bdfast/ops/sce_loss.py``. A label out of range makes its row's loss
and gradient NaN and is never used as an address. Sums over rows are float64 and their order depends on the shape alone,
so reruns are bit-identical on every GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdfast.ops.rows import classes_contiguous
from bdfast.triton_kernels import row_sum
from bdfast.triton_kernels.aot import AotVariant
from bdfast.triton_kernels.launch import enqueue
from bdfast.triton_kernels.row_sum import store_sum
from bdfast.triton_kernels.rows import (
    DTYPES_AND_CLASSES,
    Launch,
    load_label,
    load_stats,
    logit_of,
    on_device_of,
    own_tile,
    row_variant,
    store_stats,
)
from bdfast.triton_kernels.sce_margin import margin_of, other_classes

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _log1p_unit(b_e):
    """log(1 + e) for e in [0, 1] to a float32 rounding: 2 atanh(t) to t^13. The hardware's log loses small e."""
    b_t = b_e / (2.0 + b_e)
    b_t2 = b_t * b_t
    b_p = 2.0 / 11.0 + b_t2 * (2.0 / 13.0)
    b_p = 2.0 / 7.0 + b_t2 * (2.0 / 9.0 + b_t2 * b_p)
    b_p = 2.0 / 3.0 + b_t2 * (2.0 / 5.0 + b_t2 * b_p)
    return b_t * (2.0 + b_t2 * b_p)


@triton.jit
def _terms(b_margin):
    """(CE, 1 - p_y, p_y) = (softplus, sigmoid, sigmoid of the negative) of the margin."""
    b_e = tl.exp(-tl.abs(b_margin))
    b_small = b_e / (1.0 + b_e)
    b_large = 1.0 / (1.0 + b_e)
    m_wrong = b_margin > 0.0
    b_ce = tl.where(m_wrong, b_margin, 0.0) + _log1p_unit(b_e)
    return b_ce, tl.where(m_wrong, b_large, b_small), tl.where(m_wrong, b_small, b_large)


@triton.jit
def sce_loss_fwd_kernel(
    p_logits,  # [N, C], rows `stride_n` apart
    p_target,  # [N] int64
    p_loss,  # [N] float32 for REDUCE = False, else one float32, written only by a single program
    p_stats,  # [N, 2] float32
    p_partials,  # [programs] float64; unused by a single program and for REDUCE = False
    N,
    C,
    stride_n,
    alpha,
    reverse,
    REDUCE: tl.constexpr,
    MEAN: tl.constexpr,
    ONE_PROGRAM: tl.constexpr,
    GRAIN: tl.constexpr,
    TILES: tl.constexpr,  # a constant, and `while` below: numpy 2.4 breaks `range` over tensors in the interpreter
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes the loss and (maximum, sum of exp) over j != y of every row, and the sum over rows.
    # A program owns every num_programs-th block of BLOCK_N whole rows.
    # Reads N * C logits and one more a row, N labels; writes 12 bytes a row, or 8 where rows are summed.
    # Accumulates rows in float32, losses over rows in float64.
    C = C // GRAIN * GRAIN  # unchanged, and now known to be a multiple: loads become vectors
    stride_n = stride_n // GRAIN * GRAIN
    b_total = tl.zeros((BLOCK_N,), tl.float64)
    block = tl.program_id(0).to(tl.int64)
    while block < tl.cdiv(N, BLOCK_N):
        o_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        o_row = o_n * stride_n
        m_n = o_n < N
        b_y = load_label(p_target, o_n, m_n)
        b_max, b_sum, _ = other_classes(p_logits, o_row, b_y, m_n, C, TILES, BLOCK_N, BLOCK_C)
        b_zy = logit_of(p_logits, o_row, b_y, C)
        store_stats(p_stats, o_n, m_n, b_max, b_sum)
        b_ce, b_doubt, _ = _terms(margin_of(b_max, b_sum, b_zy))
        b_loss = alpha * b_ce + reverse * b_doubt
        if REDUCE:
            b_total += tl.where(m_n, b_loss, 0.0).to(tl.float64)
        else:
            tl.store(p_loss + o_n, b_loss, mask=m_n)
        block += tl.num_programs(0)
    if REDUCE:
        store_sum(b_total, p_loss, p_partials, N, MEAN, ONE_PROGRAM)


@triton.jit
def sce_loss_bwd_kernel(
    p_grad_loss,  # values `stride_grad_loss` apart: [N], or one for all rows at stride 0
    p_logits,  # [N, C], rows `stride_n` apart
    p_target,  # [N] int64
    p_stats,  # [N, 2] float32
    p_grad,  # [N, C] contiguous
    N,
    C,
    stride_n,
    stride_grad_loss,
    alpha,
    reverse,
    MEAN: tl.constexpr,
    GRAIN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes grad * (alpha + reverse p_y) * (p - onehot), the label's entry as -(1 - p_y).
    # A program owns a tile of BLOCK_N x BLOCK_C.
    # Reads and writes N * C; a tile also reads label, statistics and one logit of its rows.
    # Accumulates nothing; arithmetic in float32.
    C = C // GRAIN * GRAIN  # unchanged, and now known to be a multiple: loads and stores become vectors
    stride_n = stride_n // GRAIN * GRAIN
    o_n, o_c = own_tile(TILES, BLOCK_N, BLOCK_C)
    m_n = o_n < N
    o_row = o_n * stride_n
    b_y = load_label(p_target, o_n, m_n)
    b_zy = logit_of(p_logits, o_row, b_y, C)
    b_max, b_sum = load_stats(p_stats, o_n, m_n)
    b_scale = tl.load(p_grad_loss + o_n * stride_grad_loss, mask=m_n, other=0.0).to(tl.float32)
    if MEAN:
        b_scale = b_scale / N
    _, b_doubt, b_sure = _terms(margin_of(b_max, b_sum, b_zy))
    b_weight = b_scale * (alpha + reverse * b_sure) * b_doubt
    b_share = b_weight / tl.where(b_sum == 0.0, 1.0, b_sum)  # without other classes b_doubt is 0, or NaN
    m_tile = m_n[:, None] & (o_c < C)[None, :]
    b_z = tl.load(p_logits + o_row[:, None] + o_c[None, :], mask=m_tile, other=0.0).to(tl.float32)
    m_label = o_c[None, :] == b_y[:, None]
    b_below = tl.where(m_label, 0.0, b_z - b_max[:, None])  # <= 0: the label's exponential might overflow
    b_grad = tl.where(m_label, -b_weight[:, None], b_share[:, None] * tl.exp(b_below))
    p_tile = p_grad + o_n[:, None] * C + o_c[None, :]
    tl.store(p_tile, b_grad.to(p_grad.dtype.element_ty), mask=m_tile)


# --- launchers -------------------------------------------------------------------------------------------------------


def forward(
    logits: Tensor,  # [N, C] float32, float16 or bfloat16
    target: Tensor,  # [N] int64
    alpha: float,
    reverse: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Loss (float32, ``[N]`` or a scalar) and row statistics ``[N, 2]``."""
    z, y = classes_contiguous(logits), target.contiguous()
    n, c = z.shape
    launch = Launch.choose(c, z.stride(0))
    programs = row_sum.programs_for(n, launch.block_n)
    reduce = reduction != "none"
    mean = reduction == "mean"
    loss = z.new_empty(() if reduce else (n,), dtype=torch.float32)
    stats = z.new_empty(n, 2, dtype=torch.float32)
    two_launches = reduce and programs > 1
    partials = z.new_empty(programs, dtype=torch.float64) if two_launches else stats
    with on_device_of(z):
        enqueue(
            sce_loss_fwd_kernel, programs,
            z, y, loss, stats, partials, n, c, z.stride(0), float(alpha), float(reverse),
            REDUCE=reduce, MEAN=mean, ONE_PROGRAM=programs == 1, **launch.constants(), num_warps=launch.num_warps,
        )  # fmt: skip
        if two_launches:
            row_sum.finish(partials, loss, programs, n, mean)
    return loss, stats


def backward(
    grad_loss: Tensor,  # [N] or scalar
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N] int64
    stats: Tensor,  # [N, 2] float32
    alpha: float,
    reverse: float,
    reduction: str,
) -> Tensor:
    """Gradient of the logits: ``[N, C]``, contiguous, in their dtype."""
    z, y = classes_contiguous(logits), target.contiguous()
    n, c = z.shape
    grad = z.new_empty(n, c)
    if n == 0:
        return grad
    launch = Launch.choose(c, z.stride(0))
    with on_device_of(z):
        enqueue(
            sce_loss_bwd_kernel, launch.tiles_of(n),
            grad_loss, z, y, stats.contiguous(), grad,
            n, c, z.stride(0), grad_loss.stride(0) if reduction == "none" else 0, float(alpha), float(reverse),
            MEAN=reduction == "mean", **launch.constants(), num_warps=launch.num_warps,
        )  # fmt: skip
    return grad


# --- ahead of time ---------------------------------------------------------------------------------------------------


_SCALARS = {"N": "i32", "C": "i32", "stride_n": "i32", "alpha": "fp32", "reverse": "fp32"}


def _forward_variant(
    dtype: str, classes: int, reduction: str = "mean", one_program: bool = False, **ones: int
) -> AotVariant:
    types = {
        "p_logits": f"*{dtype}", "p_target": "*i64", "p_loss": "*fp32", "p_stats": "*fp32", "p_partials": "*fp64",
        **_SCALARS,
    }  # fmt: skip
    constants = {"REDUCE": reduction != "none", "MEAN": reduction == "mean", "ONE_PROGRAM": one_program, **ones}
    return row_variant(sce_loss_fwd_kernel, types, constants, classes)


def _backward_variant(dtype: str, classes: int, reduction: str = "mean", **ones: int) -> AotVariant:
    types = {
        "p_grad_loss": "*fp32", "p_logits": f"*{dtype}", "p_target": "*i64", "p_stats": "*fp32", "p_grad": f"*{dtype}",
        "stride_grad_loss": "i32", **_SCALARS,
    }  # fmt: skip
    return row_variant(sce_loss_bwd_kernel, types, {"MEAN": reduction == "mean", **ones}, classes)


AOT_VARIANTS = [
    *(_forward_variant(dtype, classes) for dtype, classes in DTYPES_AND_CLASSES),
    _forward_variant("fp32", 4096, "none"),
    _forward_variant("fp32", 1, one_program=True, N=1, C=1, stride_n=1),
    *(_backward_variant(dtype, classes) for dtype, classes in DTYPES_AND_CLASSES),
    _backward_variant("fp32", 4096),
    _backward_variant("fp32", 1, "none", N=1, C=1, stride_n=1, stride_grad_loss=1),
]
