"""kl_divergence on the GPU: the loss in one read of both rows, the gradients in one more and a write of each.

The equations, and what the outputs mean, are in ``bdfast/ops/kl_divergence.py``. Rows are reduced in an order that
depends on the shape alone: reruns are bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable

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
    load_tile,
    on_device_of,
    own_tile,
    row_stats,
    row_variant,
    tile_stats,
)

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _softmax_pair(b_zp, b_zq, b_stats):
    """p, q and d = log p - log q of a tile, from the (maximum, sum) of p and of q of its rows."""
    b_max_p, b_sum_p, b_max_q, b_sum_q = b_stats
    b_below_p = b_zp - b_max_p[:, None]
    b_below_q = b_zq - b_max_q[:, None]
    return _normalised(b_below_p, tl.exp(b_below_p), b_sum_p, b_below_q, tl.exp(b_below_q), b_sum_q)


@triton.jit
def _normalised(b_below_p, b_exp_p, b_sum_p, b_below_q, b_exp_q, b_sum_q):
    """p, q and d from z - maximum, its exp, and the row's sum of them."""
    b_ratio = tl.log(b_sum_p) - tl.log(b_sum_q)
    b_d = (b_below_p - b_below_q) - b_ratio[:, None]
    return b_exp_p / b_sum_p[:, None], b_exp_q / b_sum_q[:, None], b_d


@triton.jit
def _terms(b_p, b_q, b_d):
    """p (d - 1) + q, q where p = 0; for |d| < 1/2, where that cancels, by the Taylor series to d^8."""
    b_series = 1.0 / 720.0 + b_d * (-1.0 / 5040.0 + b_d * (1.0 / 40320.0))
    b_series = 1.0 / 24.0 + b_d * (-1.0 / 120.0 + b_d * b_series)
    b_series = 0.5 + b_d * (-1.0 / 6.0 + b_d * b_series)
    b_term = tl.where(tl.abs(b_d) < 0.5, b_p * (b_d * b_d) * b_series, b_p * (b_d - 1.0) + b_q)
    return tl.where(b_p == 0.0, b_q, b_term)


@triton.jit
def kl_divergence_fwd_kernel(
    p_logits_p,  # [N, C], rows `stride_p` apart
    p_logits_q,  # [N, C], rows `stride_q` apart
    p_loss,  # [N] float32 for REDUCE = False, else one float32, written only by a single program
    p_stats,  # [N, 5] float32, for KEEP_STATS
    p_partials,  # [programs] float64; unused by a single program and for REDUCE = False
    N,
    C,
    stride_p,
    stride_q,
    KEEP_STATS: tl.constexpr,
    REDUCE: tl.constexpr,
    MEAN: tl.constexpr,
    ONE_PROGRAM: tl.constexpr,
    GRAIN: tl.constexpr,
    TILES: tl.constexpr,  # a constant, and `while` below: numpy 2.4 breaks `range` over tensors in the interpreter
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes the divergence of every row, (maximum, sum of exp) of p and of q, and the sum over rows.
    # A program owns every num_programs-th block of BLOCK_N whole rows.
    # Reads 2 * N * C logits (rows of one tile once, wider ones again from the cache); writes 4 to 24 bytes a row.
    # Accumulates rows in float32, losses over rows in float64.
    C = C // GRAIN * GRAIN  # unchanged, and now known to be a multiple: loads become vectors
    stride_p = stride_p // GRAIN * GRAIN
    stride_q = stride_q // GRAIN * GRAIN
    b_total = tl.zeros((BLOCK_N,), tl.float64)
    block = tl.program_id(0).to(tl.int64)
    while block < tl.cdiv(N, BLOCK_N):
        o_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        if TILES == 1:  # both rows are on their way before either is looked at; no load and no exp is made again
            o_c = tl.arange(0, BLOCK_C)
            b_zp = load_tile(p_logits_p, o_n * stride_p, m_n, o_c, C)
            b_zq = load_tile(p_logits_q, o_n * stride_q, m_n, o_c, C)
            b_max_p, b_sum_p, b_below_p, b_exp_p = tile_stats(b_zp)
            b_max_q, b_sum_q, b_below_q, b_exp_q = tile_stats(b_zq)
            b_p, b_q, b_d = _normalised(b_below_p, b_exp_p, b_sum_p, b_below_q, b_exp_q, b_sum_q)
            b_loss = tl.sum(_terms(b_p, b_q, b_d), axis=1)
        else:
            b_max_p, b_sum_p = row_stats(p_logits_p, o_n * stride_p, m_n, C, TILES, BLOCK_N, BLOCK_C)
            b_max_q, b_sum_q = row_stats(p_logits_q, o_n * stride_q, m_n, C, TILES, BLOCK_N, BLOCK_C)
            b_loss = tl.zeros((BLOCK_N,), tl.float32)
            for tile in range(TILES):
                o_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
                b_zp = load_tile(p_logits_p, o_n * stride_p, m_n, o_c, C)
                b_zq = load_tile(p_logits_q, o_n * stride_q, m_n, o_c, C)
                b_p, b_q, b_d = _softmax_pair(b_zp, b_zq, (b_max_p, b_sum_p, b_max_q, b_sum_q))
                b_loss += tl.sum(_terms(b_p, b_q, b_d), axis=1)
        if KEEP_STATS:
            tl.store(p_stats + 5 * o_n, b_max_p, mask=m_n)
            tl.store(p_stats + 5 * o_n + 1, b_sum_p, mask=m_n)
            tl.store(p_stats + 5 * o_n + 2, b_max_q, mask=m_n)
            tl.store(p_stats + 5 * o_n + 3, b_sum_q, mask=m_n)
            tl.store(p_stats + 5 * o_n + 4, b_loss, mask=m_n)
        if REDUCE:
            b_total += tl.where(m_n, b_loss, 0.0).to(tl.float64)
        else:
            tl.store(p_loss + o_n, b_loss, mask=m_n)
        block += tl.num_programs(0)
    if REDUCE:
        store_sum(b_total, p_loss, p_partials, N, MEAN, ONE_PROGRAM)


@triton.jit
def kl_divergence_bwd_kernel(
    p_grad_loss,  # values `stride_grad_loss` apart: [N], or one for all rows at stride 0
    p_logits_p,  # [N, C], rows `stride_p` apart
    p_logits_q,  # [N, C], rows `stride_q` apart
    p_stats,  # [N, 5] float32
    p_grad_p,  # [N, C] contiguous, for WANTS_P
    p_grad_q,  # [N, C] contiguous, for WANTS_Q
    N,
    C,
    stride_p,
    stride_q,
    stride_grad_loss,
    WANTS_P: tl.constexpr,
    WANTS_Q: tl.constexpr,
    MEAN: tl.constexpr,
    GRAIN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes grad * p * (d - KL) and grad * (q - p), those that are wanted.
    # A program owns a tile of BLOCK_N x BLOCK_C.
    # Reads 2 * N * C, writes N * C for each; a tile also reads the statistics of its rows.
    # Accumulates nothing; arithmetic in float32.
    C = C // GRAIN * GRAIN  # unchanged, and now known to be a multiple: loads and stores become vectors
    stride_p = stride_p // GRAIN * GRAIN
    stride_q = stride_q // GRAIN * GRAIN
    o_n, o_c = own_tile(TILES, BLOCK_N, BLOCK_C)
    m_n = o_n < N
    m_tile = m_n[:, None] & (o_c < C)[None, :]
    b_max_p = tl.load(p_stats + 5 * o_n, mask=m_n, other=0.0)
    b_sum_p = tl.load(p_stats + 5 * o_n + 1, mask=m_n, other=1.0)
    b_max_q = tl.load(p_stats + 5 * o_n + 2, mask=m_n, other=0.0)
    b_sum_q = tl.load(p_stats + 5 * o_n + 3, mask=m_n, other=1.0)
    b_scale = tl.load(p_grad_loss + o_n * stride_grad_loss, mask=m_n, other=0.0).to(tl.float32)
    if MEAN:
        b_scale = b_scale / N
    b_zp = tl.load(p_logits_p + (o_n * stride_p)[:, None] + o_c[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_zq = tl.load(p_logits_q + (o_n * stride_q)[:, None] + o_c[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_p, b_q, b_d = _softmax_pair(b_zp, b_zq, (b_max_p, b_sum_p, b_max_q, b_sum_q))
    o_tile = o_n[:, None] * C + o_c[None, :]
    if WANTS_P:
        b_kl = tl.load(p_stats + 5 * o_n + 4, mask=m_n, other=0.0)[:, None]
        b_above = tl.where(b_p == 0.0, 0.0 * b_kl, b_p * (b_d - b_kl))  # 0 * kl: NaN where KL is not finite
        tl.store(p_grad_p + o_tile, (b_scale[:, None] * b_above).to(p_grad_p.dtype.element_ty), mask=m_tile)
    if WANTS_Q:
        b_grad_q = b_scale[:, None] * (b_q - b_p)
        tl.store(p_grad_q + o_tile, b_grad_q.to(p_grad_q.dtype.element_ty), mask=m_tile)


# --- launchers -------------------------------------------------------------------------------------------------------


def _launch(p: Tensor, q: Tensor, choose: Callable[[int, int], Launch]) -> Launch:
    """Vectors are as wide as both row strides allow."""
    return min((choose(p.shape[1], z.stride(0)) for z in (p, q)), key=lambda launch: launch.grain)


def forward(
    logits_p: Tensor,  # [N, C] float32, float16 or bfloat16
    logits_q: Tensor,  # [N, C]
    reduction: str,
    keep_stats: bool,
) -> tuple[Tensor, Tensor]:
    """Loss (float32, ``[N]`` or a scalar) and statistics ``[N, 5]``, or ``[0, 5]`` where they are not wanted."""
    p, q = classes_contiguous(logits_p), classes_contiguous(logits_q)
    n, c = p.shape
    reduce = reduction != "none"
    launch = _launch(p, q, Launch.choose if reduce else Launch.few_warps)
    programs = row_sum.programs_for(n, launch.block_n) if reduce else max(1, triton.cdiv(n, launch.block_n))
    loss = p.new_empty(() if reduce else (n,), dtype=torch.float32)
    stats = p.new_empty(n if keep_stats else 0, 5, dtype=torch.float32)
    two_launches = reduce and programs > 1
    partials = p.new_empty(programs, dtype=torch.float64) if two_launches else stats
    with on_device_of(p):
        enqueue(
            kl_divergence_fwd_kernel, programs,
            p, q, loss, stats, partials, n, c, p.stride(0), q.stride(0), KEEP_STATS=keep_stats,
            REDUCE=reduce, MEAN=reduction == "mean", ONE_PROGRAM=programs == 1,
            **launch.constants(), num_warps=launch.num_warps,
        )  # fmt: skip
        if two_launches:
            row_sum.finish(partials, loss, programs, n, reduction == "mean")
    return loss, stats


def backward(
    grad_loss: Tensor,  # [N] or scalar
    logits_p: Tensor,  # [N, C]
    logits_q: Tensor,  # [N, C]
    stats: Tensor,  # [N, 5] float32
    reduction: str,
    wants_p: bool,
    wants_q: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of both, ``[N, C]``, contiguous, in their dtype; ``[0, C]`` for one that is not wanted."""
    p, q = classes_contiguous(logits_p), classes_contiguous(logits_q)
    n, c = p.shape
    grad_p, grad_q = p.new_empty(n if wants_p else 0, c), p.new_empty(n if wants_q else 0, c)
    if n == 0:
        return grad_p, grad_q
    launch = _launch(p, q, Launch.spread)
    with on_device_of(p):
        enqueue(
            kl_divergence_bwd_kernel, launch.tiles_of(n),
            grad_loss, p, q, stats.contiguous(), grad_p, grad_q, n, c, p.stride(0), q.stride(0),
            grad_loss.stride(0) if reduction == "none" else 0, WANTS_P=wants_p, WANTS_Q=wants_q,
            MEAN=reduction == "mean", **launch.constants(), num_warps=launch.num_warps,
        )  # fmt: skip
    return grad_p, grad_q


# --- ahead of time ---------------------------------------------------------------------------------------------------


def _shared(dtype: str) -> dict[str, str]:
    """Types that both directions share."""
    pointers = {"p_logits_p": f"*{dtype}", "p_logits_q": f"*{dtype}", "p_stats": "*fp32"}
    return {**pointers, "N": "i32", "C": "i32", "stride_p": "i32", "stride_q": "i32"}


def _forward_variant(
    dtype: str, classes: int, reduction: str = "none", keep_stats: bool = False, one_program: bool = False, **ones: int
) -> AotVariant:
    constants = {
        "KEEP_STATS": keep_stats, "REDUCE": reduction != "none", "MEAN": reduction == "mean",
        "ONE_PROGRAM": one_program, **ones,
    }  # fmt: skip
    types = {**_shared(dtype), "p_loss": "*fp32", "p_partials": "*fp64"}
    choose = Launch.few_warps if reduction == "none" else Launch.choose
    return row_variant(kl_divergence_fwd_kernel, types, constants, classes, choose)


def _backward_variant(dtype: str, classes: int, wants: str, reduction: str = "none", **ones: int) -> AotVariant:
    constants = {"WANTS_P": "p" in wants, "WANTS_Q": "q" in wants, "MEAN": reduction == "mean", **ones}
    types = {
        **_shared(dtype),
        "p_grad_loss": "*fp32", "p_grad_p": f"*{dtype}", "p_grad_q": f"*{dtype}", "stride_grad_loss": "i32",
    }  # fmt: skip
    return row_variant(kl_divergence_bwd_kernel, types, constants, classes, Launch.spread)


_ONES = {"N": 1, "C": 1, "stride_p": 1, "stride_q": 1}

AOT_VARIANTS = [
    *(_forward_variant(dtype, classes) for dtype, classes in DTYPES_AND_CLASSES),
    *(_forward_variant(dtype, classes, "mean", keep_stats=True) for dtype, classes in DTYPES_AND_CLASSES),
    _forward_variant("fp32", 4096, "sum", keep_stats=True),
    _forward_variant("fp32", 1, one_program=True, **_ONES),
    *(_backward_variant(dtype, classes, "pq") for dtype, classes in DTYPES_AND_CLASSES),
    _backward_variant("fp32", 4096, "q", "mean"),
    _backward_variant("fp32", 1, "p", stride_grad_loss=1, **_ONES),
]
