"""sce_margin on the GPU: one read of the logits, one value a row.

The equations are in ``bdfast/ops/sce_margin.py``. A label out of range makes its row's margin NaN and is never used as
an address. Rows are reduced in an order that depends on the shape alone: reruns are bit-identical.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdfast.ops.rows import classes_contiguous
from bdfast.triton_kernels.aot import AotVariant
from bdfast.triton_kernels.launch import enqueue
from bdfast.triton_kernels.rows import Launch, cdiv, join_tile, load_label, logit_of, on_device_of, row_variant


@triton.jit
def update_other_classes(b_max, b_sum, b_z, b_y, o_c):
    """Join a tile of logits (-inf where masked) to maximum and sum of exp(z - maximum) over j != y of each row."""
    return join_tile(b_max, b_sum, tl.where(o_c[None, :] == b_y[:, None], float("-inf"), b_z))


@triton.jit
def other_classes(
    p_logits, o_row, b_y, m_n, C, TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Of each row, in one read: (maximum, sum of exp) over j != y, and a sum that is NaN unless all logits are finite.

    The maximum is 0 where there is none above -inf, and the sum then 0 too.
    """
    b_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    b_bad = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(TILES):
        o_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        m_tile = m_n[:, None] & (o_c < C)[None, :]
        p_tile = p_logits + o_row[:, None] + o_c[None, :]
        b_z = tl.load(p_tile, mask=m_tile, other=float("-inf")).to(tl.float32)
        b_bad += tl.sum(tl.where(m_tile, b_z - b_z, 0.0), axis=1)
        b_max, b_sum = update_other_classes(b_max, b_sum, b_z, b_y, o_c)
    return tl.where(b_max == float("-inf"), 0.0, b_max), b_sum, b_bad


@triton.jit
def margin_of(b_max, b_sum, b_zy):
    """m + log s - z_y; NaN where z_y is NaN or +inf."""
    return tl.where(b_zy == float("inf"), float("nan"), (b_max - b_zy) + tl.log(b_sum))


@triton.jit
def sce_margin_kernel(
    p_logits,  # [N, C], rows `stride_n` apart
    p_target,  # [N] int64
    p_margin,  # [N] float32
    N,
    C,
    stride_n,
    GRAIN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes logsumexp(z_j, j != y) - z_y of every row; +inf for a row that is not finite.
    # A program owns BLOCK_N whole rows.
    # Reads N * C logits and one more a row, N labels; writes 4 bytes a row.
    # Accumulates in float32.
    C = C // GRAIN * GRAIN  # unchanged, and now known to be a multiple: loads become vectors
    stride_n = stride_n // GRAIN * GRAIN
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_row = o_n * stride_n
    m_n = o_n < N
    b_y = load_label(p_target, o_n, m_n)
    b_max, b_sum, b_bad = other_classes(p_logits, o_row, b_y, m_n, C, TILES, BLOCK_N, BLOCK_C)
    b_zy = logit_of(p_logits, o_row, b_y, C)
    b_margin = tl.where(b_bad == 0.0, margin_of(b_max, b_sum, b_zy), float("inf"))
    tl.store(p_margin + o_n, b_margin, mask=m_n)


def forward(
    logits: Tensor,  # [N, C] float32, float16 or bfloat16
    target: Tensor,  # [N] int64
) -> Tensor:
    """Margins ``[N]`` float32."""
    z = classes_contiguous(logits)
    n, c = z.shape
    margin = z.new_empty(n, dtype=torch.float32)
    if n > 0:
        launch = Launch.few_warps(c, z.stride(0))
        with on_device_of(z):
            enqueue(
                sce_margin_kernel, cdiv(n, launch.block_n),
                z, target.contiguous(), margin, n, c, z.stride(0), **launch.constants(), num_warps=launch.num_warps,
            )  # fmt: skip
    return margin


def _aot_variant(dtype: str, classes: int, **ones: int) -> AotVariant:
    types = {
        "p_logits": f"*{dtype}",
        "p_target": "*i64",
        "p_margin": "*fp32",
        "N": "i32",
        "C": "i32",
        "stride_n": "i32",
    }
    return row_variant(sce_margin_kernel, types, dict(ones), classes, Launch.few_warps)


AOT_VARIANTS = [
    _aot_variant("fp32", 10),
    _aot_variant("fp32", 1000),
    _aot_variant("fp32", 4096),
    _aot_variant("bf16", 32000),
    _aot_variant("fp16", 200),
    _aot_variant("fp32", 1, N=1, C=1, stride_n=1),
]
