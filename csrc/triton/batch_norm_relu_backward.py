"""The backward of batch_norm_relu on the GPU: four reads and one write, with a residual five and two.

Launches, sums and tiles are as in ``batch_norm_relu.py``. Without a residual the mask of the ReLU is found anew from x,
by the arithmetic that found it first; with one it is read off y once, and the gradient behind it, which is that of the
residual, is written for the last pass to read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdfast.ops import channels as ch
from bdfast.triton_kernels.aot import AotVariant
from bdfast.triton_kernels.batch_norm_relu import (
    SHAPES,
    apply_launch,
    own,
    row,
    store_sums,
    sum_launch,
    sum_of_parts,
    walk_sizes,
    walk_types,
)  # fmt: skip
from bdfast.triton_kernels.channels import channel_tile, lane_sums, tiles_of
from bdfast.triton_kernels.clipped_relu import BYTES, ones
from bdfast.triton_kernels.launch import enqueue
from bdfast.triton_kernels.rows import on_device_of

TILE = 2048  # of sums: two tensors are read
FROM_X, FROM_Y = tl.constexpr(1), tl.constexpr(2)  # where the mask of the ReLU comes from; 0: there is none

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _masked(b_grad, b_d, b_y, b_scale, b_shift, dtype: tl.constexpr, MASK: tl.constexpr):
    """The gradient where the output, as it was rounded, is above 0 (or NaN)."""
    if MASK == FROM_X:
        b_y = tl.fma(b_d, b_scale, b_shift).to(dtype).to(tl.float32)
    return b_grad if MASK == 0 else tl.where(b_y <= 0.0, 0.0, b_grad)


@triton.jit
def batch_norm_relu_grad_sums_kernel(
    p_grad,  # [numel] in memory order
    p_x,  # [numel]
    p_y,  # [numel]; unused unless MASK is FROM_Y
    p_saved,  # [5, channels] float32
    p_masked,  # [numel], the gradient behind the ReLU; written where MASK is FROM_Y
    p_partials,  # [2, channels, parts] float64
    samples,
    channels,
    inner,
    parts,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # Computes a part of the sums of g and of g * (x - pivot), g the gradient behind the ReLU.
    # A program owns every `parts`-th tile of BLOCK_S samples and BLOCK_I elements of BLOCK_C channels.
    # Reads the gradient and x; with a residual y, too, and writes g.
    # Accumulates in float32: a lane its elements, then lanes by halves.
    part, o_c, m_c, channels = own(parts, channels, GRAIN, BLOCK_C, BLOCK_I)
    b_pivot = row(p_saved, 0, channels, o_c, m_c)
    b_scale, b_shift = row(p_saved, 1, channels, o_c, m_c), row(p_saved, 2, channels, o_c, m_c)
    b_first = tl.zeros((BLOCK_C, ROWS, BLOCK_I), tl.float32)
    b_second = tl.zeros((BLOCK_C, ROWS, BLOCK_I), tl.float32)
    tile = part
    while tile < tiles_of(samples, inner, BLOCK_S, BLOCK_I):
        o_x, m_x = channel_tile(tile, samples, channels, inner, o_c, GRAIN, BLOCK_S, BLOCK_I)
        b_grad = tl.load(p_grad + o_x, mask=m_x, other=0.0).to(tl.float32)  # 0 where nothing is: adds nothing
        b_d = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32) - b_pivot
        b_y = b_d
        if MASK == FROM_Y:
            b_y = tl.load(p_y + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_grad = _masked(b_grad, b_d, b_y, b_scale, b_shift, p_x.dtype.element_ty, MASK)
        if MASK == FROM_Y:
            tl.store(p_masked + o_x, b_grad.to(p_masked.dtype.element_ty), mask=m_x)
        b_first += lane_sums(b_grad, ROWS)
        b_second += lane_sums(b_grad * b_d, ROWS)
        tile += parts
    store_sums(p_partials, o_c, m_c, part, parts, channels, b_first, b_second)


@triton.jit
def batch_norm_relu_grad_stats_kernel(
    p_partials,  # [2, channels, parts] float64
    p_saved,  # [5, channels] float32
    p_grad_weight,  # [channels] float32
    p_grad_bias,  # [channels] float32
    p_slopes,  # [2, channels] float32
    per_channel,
    channels,
    parts,
):
    # Computes the gradients of weight and bias, and slope and offset of dx = scale (g + slope (x - pivot) + offset).
    # A program owns one channel.
    # Reads 16 bytes a part; writes a few numbers.
    # Accumulates in float64, in an order that does not depend on anything.
    c = tl.program_id(0).to(tl.int64)
    b_sum = sum_of_parts(p_partials + c * parts, parts)
    b_product = sum_of_parts(p_partials + (channels + c) * parts, parts)
    b_inverse = tl.load(p_saved + 3 * channels + c).to(tl.float64)
    b_delta = tl.load(p_saved + 4 * channels + c).to(tl.float64)
    b_weight = b_inverse * (b_product - b_delta * b_sum)
    b_slope = -b_inverse * b_weight / per_channel
    tl.store(p_grad_weight + c, b_weight.to(tl.float32))
    tl.store(p_grad_bias + c, b_sum.to(tl.float32))
    tl.store(p_slopes + c, b_slope.to(tl.float32))
    tl.store(p_slopes + channels + c, (-b_sum / per_channel - b_slope * b_delta).to(tl.float32))


@triton.jit
def batch_norm_relu_grad_apply_kernel(
    p_grad,  # [numel] in memory order: of y, or that behind the ReLU where MASK is 0
    p_x,  # [numel]
    p_saved,  # [5, channels] float32
    p_slopes,  # [2, channels] float32
    p_grad_x,  # [numel]
    samples,
    channels,
    inner,
    parts,
    MASK: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # Computes dx = scale (g + slope (x - pivot) + offset); scaled last, so that a sum of 0 stays one.
    # A program owns every `parts`-th tile of BLOCK_S samples and BLOCK_I elements of BLOCK_C channels, from the end.
    # Reads a gradient and x; writes dx.
    # Accumulates nothing; arithmetic in float32.
    part, o_c, m_c, channels = own(parts, channels, GRAIN, BLOCK_C, BLOCK_I)
    b_pivot = row(p_saved, 0, channels, o_c, m_c)
    b_scale, b_shift = row(p_saved, 1, channels, o_c, m_c), row(p_saved, 2, channels, o_c, m_c)
    b_slope, b_offset = row(p_slopes, 0, channels, o_c, m_c), row(p_slopes, 1, channels, o_c, m_c)
    tile = tiles_of(samples, inner, BLOCK_S, BLOCK_I) - 1 - part
    while tile >= 0:
        o_x, m_x = channel_tile(tile, samples, channels, inner, o_c, GRAIN, BLOCK_S, BLOCK_I)
        b_grad = tl.load(p_grad + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_d = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32) - b_pivot
        b_grad = _masked(b_grad, b_d, b_d, b_scale, b_shift, p_x.dtype.element_ty, MASK)
        b_dx = b_scale * (b_grad + tl.fma(b_d, b_slope, b_offset))
        tl.store(p_grad_x + o_x, b_dx.to(p_grad_x.dtype.element_ty), mask=m_x)
        tile -= parts


# --- launchers -------------------------------------------------------------------------------------------------------


def backward(
    grad: Tensor,  # [N, C, ...]
    x: Tensor,  # [N, C, ...]
    y: Tensor | None,  # [N, C, ...]; None where the mask follows from x
    saved: Tensor,  # [5, C] float32
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the residual where ``y`` is given (else empty), of weight and bias."""
    channels_last = ch.is_channels_last(x)
    grad, x = ch.dense(grad, channels_last), ch.dense(x, channels_last)
    grad_x = ch.empty_dense(x, channels_last)
    masked = x.new_empty(0) if y is None else ch.empty_dense(x, channels_last)
    grad_weight, grad_bias = (saved.new_empty(x.shape[1]) for _ in range(2))
    if x.numel() == 0:
        return grad_x, masked, grad_weight.zero_(), grad_bias.zero_()
    numel, channels, inner = ch.layout(x, channels_last, x.shape[1])
    sizes = numel // (channels * inner), channels, inner
    sums, apply = sum_launch(numel, channels, inner, TILE), apply_launch(numel, channels, inner)
    partials = x.new_empty((2, channels, sums.parts), dtype=torch.float64)
    saved, slopes = saved.contiguous(), saved.new_empty((2, channels))
    mask = 0 if not relu else FROM_X.value if y is None else FROM_Y.value
    outputs = (x, x) if y is None else (ch.dense(y, channels_last), masked)
    with on_device_of(x):
        enqueue(
            batch_norm_relu_grad_sums_kernel, sums.programs(channels),
            grad, x, outputs[0], saved, outputs[1], partials, *sizes, sums.parts,
            MASK=mask, **sums.sums(x.element_size()), num_warps=sums.num_warps,
        )  # fmt: skip
        enqueue(
            batch_norm_relu_grad_stats_kernel, channels,
            partials, saved, grad_weight, grad_bias, slopes, numel // channels, channels, sums.parts, num_warps=4,
        )  # fmt: skip
        enqueue(
            batch_norm_relu_grad_apply_kernel, apply.programs(channels),
            grad if y is None else masked, x, saved, slopes, grad_x, *sizes, apply.parts,
            MASK=mask if y is None else 0, **apply.constants(), num_warps=apply.num_warps,
        )  # fmt: skip
    return grad_x, masked, grad_weight, grad_bias


# --- ahead of time ---------------------------------------------------------------------------------------------------


def _passes(dtype: str, channels: int, inner: int, residual: bool) -> list[AotVariant]:
    sizes = walk_sizes(channels, inner)
    sums, apply = sum_launch(*sizes, TILE), apply_launch(*sizes)
    mask: dict[str, Any] = {"MASK": FROM_Y.value if residual else FROM_X.value}
    return [
        AotVariant.of(
            batch_norm_relu_grad_sums_kernel,
            walk_types(dtype, "grad x y masked", p_saved="*fp32", p_partials="*fp64"),
            {**mask, **sums.sums(BYTES[dtype]), **ones(inner)}, sums.num_warps,
        ),
        AotVariant.of(
            batch_norm_relu_grad_apply_kernel,
            walk_types(dtype, "grad x grad_x", p_saved="*fp32", p_slopes="*fp32"),
            {"MASK": 0 if residual else FROM_X.value, **apply.constants(), **ones(inner)}, apply.num_warps,
        ),
    ]  # fmt: skip


AOT_VARIANTS = [
    *(variant for shape in SHAPES for variant in _passes(*shape)),
    AotVariant.of(
        batch_norm_relu_grad_stats_kernel,
        {
            "p_partials": "*fp64", **{f"p_{name}": "*fp32" for name in ("saved", "grad_weight", "grad_bias", "slopes")},
            "per_channel": "i32", "channels": "i32", "parts": "i32",
        },
        {},
        4,
    ),
]  # fmt: skip
