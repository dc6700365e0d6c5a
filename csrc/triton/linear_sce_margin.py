"""linear_sce_margin on the GPU: the last layer's product and the margin's logsumexp in one kernel, no logits in memory.

The equations are in ``bdfast/ops/linear_sce_margin.py``. float32 inputs are multiplied in full float32 (no TF32): keys
of confident samples differ in the digits that TF32 drops. Reruns are bit-identical.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdfast.backends.availability import triton_interpreted
from bdfast.ops.rows import classes_contiguous
from bdfast.triton_kernels.aot import AotVariant
from bdfast.triton_kernels.launch import enqueue
from bdfast.triton_kernels.rows import cdiv, on_device_of
from bdfast.triton_kernels.sce_margin import margin_of, update_other_classes

BLOCK_N, BLOCK_C, BLOCK_D = 64, 64, 32
NUM_WARPS = 4


@triton.jit
def linear_sce_margin_kernel(
    p_features,  # [N, D], rows `stride_f` apart
    p_weight,  # [C, D], rows `stride_w` apart
    p_bias,  # [C], read for HAS_BIAS only
    p_target,  # [N] int64
    p_margin,  # [N] float32
    N,
    C,
    D,
    stride_f,
    stride_w,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose products of bfloat16 are wrong
    TILES_C: tl.constexpr,  # constants: numpy 2.4 breaks `range` over tensors in the interpreter
    TILES_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Computes logsumexp(z_j, j != y) - z_y of z = features weight^T + bias; +inf for a row that is not finite.
    # A program owns BLOCK_N rows and walks over all classes, BLOCK_C at a time.
    # Reads its features once a tile of classes (from L2 after the first), all weights; writes 4 bytes a row.
    # Accumulates products and exponentials in float32.
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_y = tl.load(p_target + o_n, mask=m_n, other=-1)
    b_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    b_bad = tl.zeros((BLOCK_N,), tl.float32)
    b_zy = tl.zeros((BLOCK_N,), tl.float32)
    for tile_c in range(TILES_C):
        o_c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_z = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for tile_d in range(TILES_D):
            o_d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            p_f = p_features + o_n[:, None] * stride_f + o_d[None, :]
            p_w = p_weight + o_c.to(tl.int64)[None, :] * stride_w + o_d[:, None]
            b_f = tl.load(p_f, mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_c[None, :] & m_d[:, None], other=0.0)
            if UPCAST:
                b_f = b_f.to(tl.float32)
                b_w = b_w.to(tl.float32)
            b_z = tl.dot(b_f, b_w, b_z, input_precision="ieee")
        if HAS_BIAS:
            b_z += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        m_tile = m_n[:, None] & m_c[None, :]
        b_bad += tl.sum(tl.where(m_tile, b_z - b_z, 0.0), axis=1)
        b_zy += tl.sum(tl.where(o_c[None, :] == b_y[:, None], b_z, 0.0), axis=1)
        b_max, b_sum = update_other_classes(b_max, b_sum, tl.where(m_tile, b_z, float("-inf")), b_y, o_c)
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_margin = margin_of(b_max, b_sum, tl.where((b_y >= 0) & (b_y < C), b_zy, float("nan")))
    tl.store(p_margin + o_n, tl.where(b_bad == 0.0, b_margin, float("inf")), mask=m_n)


def forward(
    features: Tensor,  # [N, D] float32, float16 or bfloat16
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64
) -> Tensor:
    """Margins ``[N]`` float32."""
    f, w, y = classes_contiguous(features), classes_contiguous(weight), target.contiguous()
    b = w if bias is None else bias.contiguous()
    (n, d), c = f.shape, w.shape[0]
    margin = f.new_empty(n, dtype=torch.float32)
    if n == 0:
        return margin
    with on_device_of(f):
        enqueue(
            linear_sce_margin_kernel, cdiv(n, BLOCK_N),
            f, w, b, y, margin, n, c, d, f.stride(0), w.stride(0),
            HAS_BIAS=bias is not None, UPCAST=triton_interpreted(),
            TILES_C=cdiv(c, BLOCK_C), TILES_D=cdiv(d, BLOCK_D),
            BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
        )  # fmt: skip
    return margin


def _aot_variant(dtype: str, classes: int, width: int, has_bias: bool) -> AotVariant:
    types = {
        "p_features": f"*{dtype}", "p_weight": f"*{dtype}", "p_bias": f"*{dtype}", "p_target": "*i64",
        "p_margin": "*fp32", "N": "i32", "C": "i32", "D": "i32", "stride_f": "i32", "stride_w": "i32",
    }  # fmt: skip
    constants = {
        "HAS_BIAS": has_bias, "UPCAST": False,
        "TILES_C": cdiv(classes, BLOCK_C), "TILES_D": cdiv(width, BLOCK_D),
        "BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C, "BLOCK_D": BLOCK_D,
    }  # fmt: skip
    aligned = (*(name for name, kind in types.items() if kind.startswith("*")), "D", "stride_f", "stride_w")
    return AotVariant(linear_sce_margin_kernel, types, constants, NUM_WARPS, aligned)


AOT_VARIANTS = [
    _aot_variant("fp32", 1000, 512, True),
    _aot_variant("fp32", 20000, 2048, False),
    _aot_variant("bf16", 1000, 512, True),
    _aot_variant("fp16", 200, 512, True),
]
