"""bounded_ascent_cross_entropy on the GPU: the loss in one read of the logits, the gradient in one more and one write.

The equations, and what the outputs mean, are in ``bdfast/ops/bounded_ascent_cross_entropy.py``. A label out of range
makes the loss NaN and is never used as an address. Sums over rows are float64 and their order depends on the shape
alone, so reruns are bit-identical on every GPU.
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
    row_stats,
    row_variant,
    softmax_gradient,
    store_stats,
)

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def bounded_ascent_cross_entropy_fwd_kernel(
    p_logits,  # [N, C], rows `stride_n` apart
    p_target,  # [N] int64
    p_loss,  # one float32, written only by a single program
    p_stats,  # [N, 2] float32
    p_partials,  # [programs] float64; unused by a single program
    N,
    C,
    stride_n,
    num_descend,
    down,  # weight of a row's CE in the loss: of one that descends
    up,  # and of one that ascends
    tau,
    ONE_PROGRAM: tl.constexpr,
    GRAIN: tl.constexpr,
    TILES: tl.constexpr,  # a constant, and `while` below: numpy 2.4 breaks `range` over tensors in the interpreter
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes (maximum, sum of exp) of every row, and the weighted sum over rows: finished if one program has all.
    # A program owns every num_programs-th block of BLOCK_N whole rows.
    # Reads N * C logits and one more a row, N labels; writes 8 bytes a row.
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
        b_ce = (b_max - b_zy) + tl.log(b_sum)
        b_bounded = tl.where(b_ce >= tau, tau, b_ce)  # NaN is not masked
        b_loss = tl.where(o_n < num_descend, down * b_ce.to(tl.float64), up * b_bounded.to(tl.float64))
        b_total += tl.where(m_n, b_loss, 0.0)
        block += tl.num_programs(0)
    store_sum(b_total, p_loss, p_partials, N, False, ONE_PROGRAM)


@triton.jit
def bounded_ascent_cross_entropy_bwd_kernel(
    p_grad_loss,  # one float32
    p_logits,  # [N, C], rows `stride_n` apart
    p_target,  # [N] int64
    p_stats,  # [N, 2] float32
    p_grad,  # [N, C] contiguous
    N,
    C,
    stride_n,
    num_descend,
    down,
    up,
    tau,
    GRAIN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes grad * weight * (softmax - onehot), exactly 0 in rows at rest.
    # A program owns a tile of BLOCK_N x BLOCK_C.
    # Reads the logits of rows not at rest; writes N * C; a tile also reads label, statistics and one logit of its rows.
    # Accumulates nothing; arithmetic in float32.
    C = C // GRAIN * GRAIN  # unchanged, and now known to be a multiple: loads and stores become vectors
    stride_n = stride_n // GRAIN * GRAIN
    o_n, o_c = own_tile(TILES, BLOCK_N, BLOCK_C)
    m_n = o_n < N
    o_row = o_n * stride_n
    b_y = load_label(p_target, o_n, m_n)
    b_zy = logit_of(p_logits, o_row, b_y, C)
    b_max, b_sum = load_stats(p_stats, o_n, m_n)
    b_ce = (b_max - b_zy) + tl.log(b_sum)
    m_descends = o_n < num_descend
    m_bounded = b_ce >= tau
    m_active = m_n & (m_descends | (m_bounded == 0))
    b_weight = tl.load(p_grad_loss).to(tl.float32) * tl.where(m_descends, down, up).to(tl.float32)
    softmax_gradient(p_logits, p_grad, o_n, o_c, o_row, m_n, m_active, b_y, b_max, b_sum, b_weight, C)


# --- launchers -------------------------------------------------------------------------------------------------------


def _options(rows: int, num_descend: int, mu: float, tau: float) -> tuple[int, float, float, float]:
    """``num_descend``, weight of a row that descends and of one that ascends, tau."""
    return num_descend, 1.0 / max(1, num_descend), -float(mu) / max(1, rows - num_descend), float(tau)


def forward(
    logits: Tensor,  # [N, C] float32, float16 or bfloat16
    target: Tensor,  # [N] int64
    num_descend: int,
    mu: float,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """Loss (one float32) and row statistics ``[N, 2]``."""
    z, y = classes_contiguous(logits), target.contiguous()
    n, c = z.shape
    launch = Launch.choose(c, z.stride(0))
    programs = row_sum.programs_for(n, launch.block_n)
    loss = z.new_empty((), dtype=torch.float32)
    stats = z.new_empty(n, 2, dtype=torch.float32)
    partials = z.new_empty(programs, dtype=torch.float64) if programs > 1 else stats
    with on_device_of(z):
        enqueue(
            bounded_ascent_cross_entropy_fwd_kernel, programs,
            z, y, loss, stats, partials, n, c, z.stride(0), *_options(n, num_descend, mu, tau),
            ONE_PROGRAM=programs == 1, **launch.constants(), num_warps=launch.num_warps,
        )  # fmt: skip
        if programs > 1:
            row_sum.finish(partials, loss, programs, n, mean=False)
    return loss, stats


def backward(
    grad_loss: Tensor,  # scalar
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N] int64
    stats: Tensor,  # [N, 2] float32
    num_descend: int,
    mu: float,
    tau: float,
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
            bounded_ascent_cross_entropy_bwd_kernel, launch.tiles_of(n),
            grad_loss, z, y, stats.contiguous(), grad, n, c, z.stride(0), *_options(n, num_descend, mu, tau),
            **launch.constants(), num_warps=launch.num_warps,
        )  # fmt: skip
    return grad


# --- ahead of time ---------------------------------------------------------------------------------------------------

_SCALARS = {
    "N": "i32", "C": "i32", "stride_n": "i32", "num_descend": "i32", "down": "fp32", "up": "fp32", "tau": "fp32",
}  # fmt: skip


def _forward_variant(dtype: str, classes: int, one_program: bool = False, **ones: int) -> AotVariant:
    types = {
        "p_logits": f"*{dtype}", "p_target": "*i64", "p_loss": "*fp32", "p_stats": "*fp32", "p_partials": "*fp64",
        **_SCALARS,
    }  # fmt: skip
    constants = {"ONE_PROGRAM": one_program, **ones}
    return row_variant(bounded_ascent_cross_entropy_fwd_kernel, types, constants, classes)


def _backward_variant(dtype: str, classes: int, **ones: int) -> AotVariant:
    types = {
        "p_grad_loss": "*fp32", "p_logits": f"*{dtype}", "p_target": "*i64", "p_stats": "*fp32", "p_grad": f"*{dtype}",
        **_SCALARS,
    }  # fmt: skip
    return row_variant(bounded_ascent_cross_entropy_bwd_kernel, types, dict(ones), classes)


AOT_VARIANTS = [
    *(_forward_variant(dtype, classes) for dtype, classes in DTYPES_AND_CLASSES),
    _forward_variant("bf16", 10, one_program=True),
    _forward_variant("fp32", 1, one_program=True, N=1, C=1, stride_n=1, num_descend=1),
    *(_backward_variant(dtype, classes) for dtype, classes in DTYPES_AND_CLASSES),
    _backward_variant("fp32", 1, N=1, C=1, stride_n=1, num_descend=1),
]
