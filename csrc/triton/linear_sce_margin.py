"""linear_sce_margin on the GPU: products and their logsumexp in one kernel, on tensor cores.

The equations are in ``bdfast/ops/linear_sce_margin.py``. Keys of confident samples differ in the digits that TF32
drops: float32 products are three TF32 products each (``tf32x3``), 2e-7 of the largest key from exact whatever cuBLAS is
allowed. Sums are float32, those of half precision too. Reruns are bit-identical.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Launch:
    """Shape of the fused kernel's programs.

    Attributes:
        block_n: rows that a program owns.
        block_c: classes of a tile of logits.
        block_d: features that a step of the product takes.
        num_warps: of a program.
        tiles: of classes that a program walks over.
        splits: programs that share rows.
    """

    block_n: int
    block_c: int
    block_d: int
    num_warps: int
    tiles: int
    splits: int

    @classmethod
    @functools.lru_cache(maxsize=1024)  # a choice takes longer than the kernel that it is for
    def choose(cls, rows: int, classes: int, dtype: torch.dtype) -> Launch:
        """Rows alone would leave most of a GPU idle, as 1000 of them do: programs split the classes, too.

        64 x 128 logits of half precision leave room for two programs on a multiprocessor, one of which multiplies while
        the other takes exponentials; both walk over several tiles where there are more. Operands of float32 are split
        in registers: smaller tiles, more programs.
        """
        block_c, block_d, programs = (64, 32, 512) if dtype == torch.float32 else (128, 64, 256)
        block_n, num_warps = 64, 4
        blocks, all_tiles = cdiv(rows, block_n), cdiv(classes, block_c)
        tiles = cdiv(all_tiles, min(all_tiles, cdiv(programs, blocks)))
        return cls(block_n, block_c, block_d, num_warps, tiles, cdiv(all_tiles, tiles))


@triton.jit
def linear_sce_margin_kernel(
    p_features,  # [N, D], rows `stride_f` apart
    p_weight,  # [C, D], rows `stride_w` apart
    p_bias,  # [C], read for HAS_BIAS only
    p_target,  # [N] int64
    p_margin,  # [N] float32, or [3, SPLITS, N] of what the next launch joins
    N,
    C,
    D,
    stride_f,
    stride_w,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose products of bfloat16 are wrong
    SPLITS: tl.constexpr,
    TILES_C: tl.constexpr,  # constants: numpy 2.4 breaks `range` over tensors in the interpreter
    TILES_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Computes logsumexp(z_j, j != y) - z_y of z = features weight^T + bias; +inf for a row that is not finite.
    # A program owns BLOCK_N rows and walks over TILES_C tiles of BLOCK_C classes; neighbours share features.
    # Reads its features once a tile of classes (from L2 after the first), its weights; writes 4 or 12 bytes a row.
    # Accumulates products and exponentials in float32.
    split = tl.program_id(0) % SPLITS
    o_n = (tl.program_id(0) // SPLITS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_y = tl.load(p_target + o_n, mask=m_n, other=-1)
    b_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    b_bad = tl.zeros((BLOCK_N,), tl.float32)
    b_zy = tl.zeros((BLOCK_N,), tl.float32)
    for tile_c in range(TILES_C):
        o_c = (split * TILES_C + tile_c) * BLOCK_C + tl.arange(0, BLOCK_C)
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
            b_z = tl.dot(b_f, b_w, b_z, input_precision="tf32x3")
        if HAS_BIAS:
            b_z += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        m_tile = m_n[:, None] & m_c[None, :]
        b_bad += tl.sum(tl.where(m_tile, b_z - b_z, 0.0), axis=1)
        b_zy += tl.sum(tl.where(o_c[None, :] == b_y[:, None], b_z, 0.0), axis=1)
        b_max, b_sum = update_other_classes(b_max, b_sum, tl.where(m_tile, b_z, float("-inf")), b_y, o_c)
    if SPLITS == 1:
        tl.store(p_margin + o_n, _margin(b_max, b_sum + b_bad, b_zy, b_y, C), mask=m_n)
    else:
        p_part = p_margin + split * N + o_n  # 32 bits do: rows share programs only while there are few
        tl.store(p_part, b_max, mask=m_n)
        tl.store(p_part + SPLITS * N, b_sum + b_bad, mask=m_n)
        tl.store(p_part + 2 * SPLITS * N, b_zy, mask=m_n)


@triton.jit
def linear_sce_margin_join_kernel(
    p_parts,  # [3, splits, N] float32: maximum, sum of exp (NaN for a row that is not finite), the label's logit or 0
    p_target,  # [N] int64
    p_margin,  # [N] float32
    N,
    C,
    splits,
    BLOCK_N: tl.constexpr,
):
    # Computes the margins from what the programs that share rows have found of their classes.
    # A program owns BLOCK_N rows.
    # Reads 12 bytes a row and split; writes 4 a row.
    # Accumulates in float32, in the order of classes.
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_y = tl.load(p_target + o_n, mask=m_n, other=-1)
    b_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    b_zy = tl.zeros((BLOCK_N,), tl.float32)
    p_part = p_parts + o_n
    split = tl.zeros((), tl.int32)
    while split < splits:
        b_next_max = tl.load(p_part, mask=m_n, other=0.0)
        b_next_sum = tl.load(p_part + splits * N, mask=m_n, other=1.0)
        b_zy += tl.load(p_part + 2 * splits * N, mask=m_n, other=0.0)
        b_top = tl.maximum(b_max, b_next_max)
        b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_sum = b_sum * tl.exp(b_max - b_shift) + b_next_sum * tl.exp(b_next_max - b_shift)
        b_max = b_top
        p_part += N
        split += 1
    tl.store(p_margin + o_n, _margin(b_max, b_sum, b_zy, b_y, C), mask=m_n)


@triton.jit
def _margin(b_max, b_sum, b_zy, b_y, C):
    """The margin of finite rows; +inf where the sum is NaN, NaN where the label is outside [0, C)."""
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_margin = margin_of(b_max, b_sum, tl.where((b_y >= 0) & (b_y < C), b_zy, float("nan")))
    return tl.where(b_sum == b_sum, b_margin, float("inf"))


def forward(
    features: Tensor,  # [N, D] float32, float16 or bfloat16
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64
) -> Tensor:
    """Margins ``[N]`` float32."""
    margin = features.new_empty(len(features), dtype=torch.float32)
    if len(features) == 0:
        return margin
    f, w = classes_contiguous(features), classes_contiguous(weight)
    (n, d), c = f.shape, w.shape[0]
    launch, labels = Launch.choose(n, c, f.dtype), target.contiguous()
    parts = margin if launch.splits == 1 else margin.new_empty((3, launch.splits, n))
    with on_device_of(features):
        enqueue(
            linear_sce_margin_kernel, cdiv(n, launch.block_n) * launch.splits,
            f, w, w if bias is None else bias.contiguous(), labels, parts, n, c, d, f.stride(0), w.stride(0),
            UPCAST=triton_interpreted(), **_constants(launch, d, bias is not None), num_warps=launch.num_warps,
        )  # fmt: skip
        if launch.splits > 1:
            enqueue(
                linear_sce_margin_join_kernel, cdiv(n, 128),
                parts, labels, margin, n, c, launch.splits, BLOCK_N=128, num_warps=4,
            )  # fmt: skip
    return margin


def _constants(launch: Launch, width: int, has_bias: bool) -> dict[str, Any]:
    return {
        "HAS_BIAS": has_bias, "SPLITS": launch.splits,
        "TILES_C": launch.tiles, "TILES_D": cdiv(width, launch.block_d),
        "BLOCK_N": launch.block_n, "BLOCK_C": launch.block_c, "BLOCK_D": launch.block_d,
    }  # fmt: skip


# --- ahead of time ---------------------------------------------------------------------------------------------------


def _aot_variant(dtype: torch.dtype, rows: int, classes: int, width: int, has_bias: bool) -> AotVariant:
    kind = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {
        "p_features": kind, "p_weight": kind, "p_bias": kind, "p_target": "*i64",
        "p_margin": "*fp32", "N": "i32", "C": "i32", "D": "i32", "stride_f": "i32", "stride_w": "i32",
    }  # fmt: skip
    launch = Launch.choose(rows, classes, dtype)
    constants = {"UPCAST": False, **_constants(launch, width, has_bias)}
    aligned = (*(name for name, kind in types.items() if kind.startswith("*")), "D", "stride_f", "stride_w")
    return AotVariant(linear_sce_margin_kernel, types, constants, launch.num_warps, aligned)


AOT_VARIANTS = [
    _aot_variant(torch.float32, 1000, 1000, 512, True),
    _aot_variant(torch.float32, 500, 20000, 2048, False),
    _aot_variant(torch.bfloat16, 1000, 1000, 512, True),
    _aot_variant(torch.bfloat16, 50000, 1000, 512, True),
    _aot_variant(torch.float16, 10000, 200, 512, True),
    AotVariant.of(
        linear_sce_margin_join_kernel,
        {"p_parts": "*fp32", "p_target": "*i64", "p_margin": "*fp32", "N": "i32", "C": "i32", "splits": "i32"},
        {"BLOCK_N": 128},
        4,
    ),
]
