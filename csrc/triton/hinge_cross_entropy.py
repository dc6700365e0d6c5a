"""hinge_cross_entropy on the GPU: the loss in one read of the logits, the gradient in one more read and one write.

The equations, and what the outputs mean, are in ``bdfast/ops/hinge_cross_entropy.py``. A label out of range makes its
row's loss NaN and is never used as an address. Sums over rows are float64 and their order depends on the shape alone,
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
from bdfast.triton_kernels.row_sum import reduced
from bdfast.triton_kernels.rows import (
    DTYPES_AND_CLASSES,
    Launch,
    load_label,
    load_stats,
    logit_of,
    on_device_of,
    own_tile,
    row_stats,
    row_variant,
    softmax_gradient,
    store_stats,
)

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _hinge(b_ce, margin):
    """max(0, CE - margin), where a NaN is not masked."""
    return tl.where(b_ce <= margin, 0.0, b_ce - margin)


@triton.jit
def _reduced_loss(b_total, N, margin, MEAN: tl.constexpr, BATCH_HINGE: tl.constexpr):
    """The scalar loss from the float64 sum over rows, with the hinge of a batch on it."""
    b_loss = reduced(b_total, N, MEAN)
    if BATCH_HINGE:
        b_loss = _hinge(b_loss, margin)
    return b_loss


@triton.jit
def hinge_cross_entropy_fwd_kernel(
    p_logits,  # [N, C], rows `stride_n` apart
    p_target,  # [N] int64
    p_loss,  # [N] float32 for REDUCE = False, else one float32, written only by a single program
    p_stats,  # [N, 2] float32
    p_partials,  # [programs] float64; unused by a single program and for REDUCE = False
    N,
    C,
    stride_n,
    margin,
    REDUCE: tl.constexpr,
    MEAN: tl.constexpr,
    BATCH_HINGE: tl.constexpr,
    ONE_PROGRAM: tl.constexpr,
    GRAIN: tl.constexpr,
    TILES: tl.constexpr,  # a constant, and `while` below: numpy 2.4 breaks `range` over tensors in the interpreter
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes the loss and (maximum, sum of exp) of every row, and the sum over rows: finished if one program has all.
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
        b_max, b_sum = row_stats(p_logits, o_row, m_n, C, TILES, BLOCK_N, BLOCK_C)
        b_zy = logit_of(p_logits, o_row, b_y, C)
        store_stats(p_stats, o_n, m_n, b_max, b_sum)
        b_loss = (b_max - b_zy) + tl.log(b_sum)
        if not BATCH_HINGE:
            b_loss = _hinge(b_loss, margin)
        if REDUCE:
            b_total += tl.where(m_n, b_loss, 0.0).to(tl.float64)
        else:
            tl.store(p_loss + o_n, b_loss, mask=m_n)
        block += tl.num_programs(0)
    if REDUCE:
        b_sum_of_rows = tl.sum(b_total, axis=0)
        if ONE_PROGRAM:
            tl.store(p_loss, _reduced_loss(b_sum_of_rows, N, margin, MEAN, BATCH_HINGE))
        else:
            tl.store(p_partials + tl.program_id(0), b_sum_of_rows)


@triton.jit
def hinge_cross_entropy_sum_kernel(
    p_partials,  # [programs] float64
    p_loss,  # one float32
    programs,
    N,
    margin,
    MEAN: tl.constexpr,
    BATCH_HINGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Computes the scalar loss from the sums that the programs of the forward left.
    # A single program owns them all.
    # Reads 8 bytes a program of the forward; writes 4.
    # Accumulates in float64, in an order fixed by BLOCK.
    o_p = tl.arange(0, BLOCK)
    b_partials = tl.load(p_partials + o_p, mask=o_p < programs, other=0.0)
    tl.store(p_loss, _reduced_loss(tl.sum(b_partials, axis=0), N, margin, MEAN, BATCH_HINGE))


@triton.jit
def hinge_cross_entropy_bwd_kernel(
    p_grad_loss,  # values `stride_grad_loss` apart: [N], or one for all rows at stride 0
    p_logits,  # [N, C], rows `stride_n` apart
    p_target,  # [N] int64
    p_stats,  # [N, 2] float32
    p_loss,  # one float32, read for BATCH_HINGE only
    p_grad,  # [N, C] contiguous
    N,
    C,
    stride_n,
    stride_grad_loss,
    margin,
    MEAN: tl.constexpr,
    BATCH_HINGE: tl.constexpr,
    GRAIN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes grad * (softmax - onehot) where the hinge is active, exactly 0 elsewhere.
    # A program owns a tile of BLOCK_N x BLOCK_C.
    # Reads the logits of active rows; writes N * C; a tile also reads label, statistics and one logit of its rows.
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
    if BATCH_HINGE:
        m_idle = tl.load(p_loss) <= 0.0  # NaN is active
        m_active = m_n & (m_idle == 0)
    else:
        b_ce = (b_max - b_zy) + tl.log(b_sum)
        m_idle_rows = b_ce <= margin
        m_active = m_n & (m_idle_rows == 0)
    softmax_gradient(p_logits, p_grad, o_n, o_c, o_row, m_n, m_active, b_y, b_max, b_sum, b_scale, C)


# --- launchers -------------------------------------------------------------------------------------------------------


def forward(
    logits: Tensor,  # [N, C] float32, float16 or bfloat16
    target: Tensor,  # [N] int64
    margin: float,
    reduction: str,
    hinge: str,
) -> tuple[Tensor, Tensor]:
    """Loss (float32, ``[N]`` or a scalar) and row statistics ``[N, 2]``."""
    z, y = classes_contiguous(logits), target.contiguous()
    n, c = z.shape
    launch = Launch.choose(c, z.stride(0))
    programs = row_sum.programs_for(n, launch.block_n)
    reduce = reduction != "none"
    options = {"MEAN": reduction == "mean", "BATCH_HINGE": hinge == "batch"}
    loss = z.new_empty(() if reduce else (n,), dtype=torch.float32)
    stats = z.new_empty(n, 2, dtype=torch.float32)
    two_launches = reduce and programs > 1
    partials = z.new_empty(programs, dtype=torch.float64) if two_launches else stats
    with on_device_of(z):
        enqueue(
            hinge_cross_entropy_fwd_kernel, programs,
            z, y, loss, stats, partials, n, c, z.stride(0), float(margin),
            REDUCE=reduce, ONE_PROGRAM=programs == 1, **options, **launch.constants(), num_warps=launch.num_warps,
        )  # fmt: skip
        if two_launches:
            enqueue(
                hinge_cross_entropy_sum_kernel, 1,
                partials, loss, programs, n, float(margin), **options, BLOCK=row_sum.MAX_PROGRAMS, num_warps=4,
            )  # fmt: skip
    return loss, stats


def backward(
    grad_loss: Tensor,  # [N] or scalar
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N] int64
    stats: Tensor,  # [N, 2] float32
    loss: Tensor,  # [N] or scalar
    margin: float,
    reduction: str,
    hinge: str,
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
            hinge_cross_entropy_bwd_kernel, launch.tiles_of(n),
            grad_loss, z, y, stats.contiguous(), loss, grad,
            n, c, z.stride(0), grad_loss.stride(0) if reduction == "none" else 0, float(margin),
            MEAN=reduction == "mean", BATCH_HINGE=hinge == "batch", **launch.constants(), num_warps=launch.num_warps,
        )  # fmt: skip
    return grad


# --- ahead of time ---------------------------------------------------------------------------------------------------


def _forward_variant(
    dtype: str, classes: int, reduction: str = "mean", hinge: str = "sample", one_program: bool = False, **ones: int
) -> AotVariant:
    types = {
        "p_logits": f"*{dtype}", "p_target": "*i64", "p_loss": "*fp32", "p_stats": "*fp32", "p_partials": "*fp64",
        "N": "i32", "C": "i32", "stride_n": "i32", "margin": "fp32",
    }  # fmt: skip
    constants = {
        "REDUCE": reduction != "none", "MEAN": reduction == "mean", "BATCH_HINGE": hinge == "batch",
        "ONE_PROGRAM": one_program, **ones,
    }  # fmt: skip
    return row_variant(hinge_cross_entropy_fwd_kernel, types, constants, classes)


def _backward_variant(
    dtype: str, classes: int, reduction: str = "mean", hinge: str = "sample", **ones: int
) -> AotVariant:
    types = {
        "p_grad_loss": "*fp32", "p_logits": f"*{dtype}", "p_target": "*i64", "p_stats": "*fp32", "p_loss": "*fp32",
        "p_grad": f"*{dtype}", "N": "i32", "C": "i32", "stride_n": "i32", "stride_grad_loss": "i32", "margin": "fp32",
    }  # fmt: skip
    constants = {"MEAN": reduction == "mean", "BATCH_HINGE": hinge == "batch", **ones}
    return row_variant(hinge_cross_entropy_bwd_kernel, types, constants, classes)


AOT_VARIANTS = [
    *(_forward_variant(dtype, classes) for dtype, classes in DTYPES_AND_CLASSES),
    _forward_variant("fp32", 10, hinge="batch", one_program=True),
    _forward_variant("fp32", 4096, reduction="none"),
    _forward_variant("fp32", 1, one_program=True, N=1, C=1, stride_n=1),
    *(_backward_variant(dtype, classes) for dtype, classes in DTYPES_AND_CLASSES),
    _backward_variant("fp32", 4096, hinge="batch"),
    _backward_variant("fp32", 1, reduction="none", N=1, C=1, stride_n=1, stride_grad_loss=1),
    AotVariant.of(
        hinge_cross_entropy_sum_kernel,
        {"p_partials": "*fp64", "p_loss": "*fp32", "programs": "i32", "N": "i32", "margin": "fp32"},
        {"MEAN": True, "BATCH_HINGE": True, "BLOCK": row_sum.MAX_PROGRAMS},
        4,
    ),
]
