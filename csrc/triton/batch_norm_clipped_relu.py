"""batch_norm_clipped_relu on the GPU: eval-mode batch norm, ReLU and clip in one read and one write.

The equations are in ``bdfast/ops/batch_norm_clipped_relu.py``; tiles, bits and the backward are those of clipped_relu.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdfast.ops import channels as ch
from bdfast.triton_kernels import clipped_relu as plain
from bdfast.triton_kernels.aot import AotVariant
from bdfast.triton_kernels.channels import load_channels, memory_tile, order, store_bits
from bdfast.triton_kernels.clipped_relu import _clip
from bdfast.triton_kernels.launch import enqueue
from bdfast.triton_kernels.rows import on_device_of

SCALES = 2048  # that a program stores


@triton.jit
def batch_norm_clipped_relu_fwd_kernel(
    p_x,  # [numel] in memory order
    p_mean,  # [channels] float32
    p_var,  # [channels] float32
    p_weight,  # [channels] float32; unused where HAS_WEIGHT is False
    p_bias,  # [channels] float32; unused where HAS_BIAS is False
    eps,
    p_bound,  # [channels] float32, or one number where ONE_BOUND; unused where HAS_BOUND is False
    limit,  # the bound where HAS_BOUND is False
    p_y,  # [numel]
    p_scale,  # [channels] float32
    p_pass,  # [blocks, 16] int32; unused where PASS is False
    p_clip,  # [blocks, 16] int32; unused where CLIP is False
    numel,
    channels,
    inner,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BOUND: tl.constexpr,
    ONE_BOUND: tl.constexpr,
    PASS: tl.constexpr,
    CLIP: tl.constexpr,
    GRAIN: tl.constexpr,
    LAST: tl.constexpr,
    CYCLE: tl.constexpr,
    PLANES: tl.constexpr,
    LOW: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes y = min(max((x - mean) * scale + bias, 0), bound), scale = weight / sqrt(var + eps), and the bits.
    # A program owns BLOCKS blocks of 512 elements, and stores the scale of BLOCK_C channels while there are any.
    # Reads x, writes y; one bit an element and gradient more.
    # Accumulates nothing; arithmetic in float32.
    block = tl.program_id(0).to(tl.int64) * BLOCKS
    o_x, m_x, b_c, b_plane = memory_tile(block, numel, channels, inner, GRAIN, LAST, CYCLE, PLANES, LOW, BLOCKS)
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_scale = tl.rsqrt(load_channels(p_var, b_c, b_plane, channels, PLANES) + eps)
    if HAS_WEIGHT:
        b_scale = b_scale * load_channels(p_weight, b_c, b_plane, channels, PLANES)
    b_t = (b_x - load_channels(p_mean, b_c, b_plane, channels, PLANES)) * b_scale
    if HAS_BIAS:
        b_t += load_channels(p_bias, b_c, b_plane, channels, PLANES)
    b_z = limit + 0.0  # which -0.0 is not
    if HAS_BOUND:
        if ONE_BOUND:
            b_z = tl.load(p_bound) + 0.0
        else:
            b_z = load_channels(p_bound, b_c, b_plane, channels, PLANES) + 0.0
    b_y, m_pass, m_clip = _clip(b_t, b_z)
    tl.store(p_y + o_x, b_y.to(p_y.dtype.element_ty), mask=m_x)
    if PASS:
        store_bits(p_pass, m_pass & m_x, block, numel, LOW, BLOCKS)
    if CLIP:
        store_bits(p_clip, m_clip & m_x, block, numel, LOW, BLOCKS)

    if tl.program_id(0) < tl.cdiv(channels, BLOCK_C):  # that of a later program would not fit 32 bits
        o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < channels
        b_factor = tl.rsqrt(tl.load(p_var + o_c, mask=m_c, other=1.0) + eps)
        if HAS_WEIGHT:
            b_factor = b_factor * tl.load(p_weight + o_c, mask=m_c, other=0.0)
        tl.store(p_scale + o_c, b_factor, mask=m_c)


def forward(
    x: Tensor,  # [N, C, ...] float32, float16 or bfloat16
    mean: Tensor,  # [C] float32
    var: Tensor,  # [C] float32
    weight: Tensor | None,  # [C] float32
    bias: Tensor | None,  # [C] float32
    eps: float,
    bound: Tensor | None,  # [] or [C] float32
    limit: float,
    need_x: bool,
    need_bound: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations of the layout of ``x``, the bits ``[gradients, blocks, 16]``, and the factor of each channel."""
    channels_last = ch.is_channels_last(x)
    x = ch.dense(x, channels_last)
    y, bits = ch.empty_dense(x, channels_last), ch.empty_bits(x, need_x + need_bound)
    channels, inner = len(mean), ch.inner(x, channels_last)
    scale = x.new_empty(channels, dtype=torch.float32)
    if x.numel() == 0:
        return y, bits, scale.zero_()
    parameters = [x if p is None else p.contiguous() for p in (mean, var, weight, bias)]
    constants = order(channels, inner, x.element_size())
    with on_device_of(x):
        enqueue(
            batch_norm_clipped_relu_fwd_kernel, plain.programs(x.numel(), constants),
            x, *parameters, eps, x if bound is None else bound.contiguous(), limit, y, scale,
            *plain.bit_planes(bits, x, need_x, need_bound), x.numel(), channels, inner,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_BOUND=bound is not None,
            ONE_BOUND=bound is not None and bound.numel() == 1, PASS=need_x, CLIP=need_bound,
            **constants, BLOCK_C=SCALES, num_warps=4,
        )  # fmt: skip
    return y, bits, scale


# --- ahead of time ---------------------------------------------------------------------------------------------------


def _variant(dtype: str, needs: bool, inner: int = 1024) -> AotVariant:
    types = {
        "p_x": f"*{dtype}", "p_mean": "*fp32", "p_var": "*fp32", "p_weight": "*fp32", "p_bias": "*fp32", "eps": "fp32",
        "p_bound": "*fp32", "limit": "fp32", "p_y": f"*{dtype}", "p_scale": "*fp32", "p_pass": "*i32",
        "p_clip": "*i32", "numel": "i32", "channels": "i32", "inner": "i32",
    }  # fmt: skip
    constants: dict[str, Any] = {
        "HAS_WEIGHT": True, "HAS_BIAS": True, "HAS_BOUND": True, "ONE_BOUND": False, "PASS": needs, "CLIP": needs,
        "BLOCK_C": SCALES, **order(64, inner, plain.BYTES[dtype]), **plain.ones(inner),
    }  # fmt: skip
    return AotVariant.of(batch_norm_clipped_relu_fwd_kernel, types, constants, 4)


AOT_VARIANTS = [
    *(_variant(dtype, needs) for dtype in ("fp32", "bf16", "fp16") for needs in (True, False)),
    *(_variant("fp32", True, inner) for inner in (12544, 784, 49, 1)),
]
