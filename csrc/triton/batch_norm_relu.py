"""batch_norm_relu on the GPU: two reads and one write forward, four reads and one write backward.

The equations are in ``bdfast/ops/batch_norm_relu.py``; tiles are those of clipped_relu's backward, which walks
channels. Forward and backward (``batch_norm_relu_backward.py``) are three launches each: sums over parts of a channel,
the numbers of a channel from all parts, and a pass that applies them. That pass walks tiles from the end, where what
the sums read last is still in L2.

Sums are float32 within a program: float64 would take longer than the reads. A lane adds some hundred values, about a
pivot near the mean so that squares do not cancel, and lanes are added by halves; parts are added in float64, in an
order that does not depend on which program is done first. Reruns are bit-identical.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdfast.ops import channels as ch
from bdfast.triton_kernels.aot import AotVariant
from bdfast.triton_kernels.channels import Launch, channel_sums, channel_tile, lane_sums, own_channels, tiles_of
from bdfast.triton_kernels.clipped_relu import BYTES, ones
from bdfast.triton_kernels.launch import enqueue
from bdfast.triton_kernels.rows import cdiv, on_device_of

# Of sums: programs that are all there at once (8 on each of 132 multiprocessors, 4 warps each), and for large inputs as
# many more as keep what a lane adds short.
PROGRAMS, TILE = 1024, 4096
TILES = 64  # most tiles of a program
PARTS = tl.constexpr(1024)  # that are added at a time
PIVOTS = tl.constexpr(8)  # values of a channel whose mean is its pivot

# --- a channel and its numbers ---------------------------------------------------------------------------------------


@triton.jit
def own(parts, channels, GRAIN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr):
    """What :func:`own_channels` gives, and the number of channels, known to be a multiple where it is one."""
    if BLOCK_I == 1:
        channels = channels // GRAIN * GRAIN
    part, o_c, m_c = own_channels(parts, channels, BLOCK_C)
    return part, o_c, m_c, channels


@triton.jit
def _pivot_of(p_x, o_c, m_c, samples, channels, inner):
    """Mean of a few values of each channel, spread over samples and places: all programs find the same."""
    b_sum = tl.zeros_like(o_c).to(tl.float32)
    for k in tl.static_range(PIVOTS):  # loads a thread, not a tile of them: nothing is exchanged
        sample, place = tl.cast(samples, tl.int64) * k // PIVOTS, tl.cast(inner, tl.int64) * k // PIVOTS
        b_sum += tl.load(p_x + (sample * channels + o_c) * inner + place, mask=m_c, other=0.0).to(tl.float32)
    return b_sum / PIVOTS


@triton.jit
def row(p_saved, row: tl.constexpr, channels, o_c, m_c):
    """One number of each channel, shaped to meet a tile."""
    return tl.load(p_saved + row * channels + o_c, mask=m_c, other=0.0)[:, None, None]


@triton.jit
def sum_of_parts(p_parts, parts):
    b_sum = tl.zeros((PARTS,), tl.float64)
    first = 0
    while first < parts:
        o_p = first + tl.arange(0, PARTS)
        b_sum += tl.load(p_parts + o_p, mask=o_p < parts, other=0.0)
        first += PARTS
    return tl.sum(b_sum, axis=0)


@triton.jit
def store_sums(p_partials, o_c, m_c, part, parts, channels, b_first, b_second):
    o_p = o_c.to(tl.int64) * parts + part
    tl.store(p_partials + o_p, channel_sums(b_first).to(tl.float64), mask=m_c)
    tl.store(p_partials + channels * parts + o_p, channel_sums(b_second).to(tl.float64), mask=m_c)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def batch_norm_relu_sums_kernel(
    p_x,  # [numel] in memory order
    p_partials,  # [2, channels, parts] float64
    samples,
    channels,
    inner,
    parts,
    ROWS: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # Computes a part of the sums of x - pivot and of its squares.
    # A program owns every `parts`-th tile of BLOCK_S samples and BLOCK_I elements of BLOCK_C channels.
    # Reads x; writes 16 bytes a channel.
    # Accumulates in float32: a lane its elements, then lanes by halves.
    part, o_c, m_c, channels = own(parts, channels, GRAIN, BLOCK_C, BLOCK_I)
    b_pivot = _pivot_of(p_x, o_c, m_c, samples, channels, inner)
    b_first = tl.zeros((BLOCK_C, ROWS, BLOCK_I), tl.float32)
    b_second = tl.zeros((BLOCK_C, ROWS, BLOCK_I), tl.float32)
    tile = part
    while tile < tiles_of(samples, inner, BLOCK_S, BLOCK_I):
        o_x, m_x = channel_tile(tile, samples, channels, inner, o_c, GRAIN, BLOCK_S, BLOCK_I)
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_d = tl.where(m_x, b_x - b_pivot[:, None, None], 0.0)
        b_first += lane_sums(b_d, ROWS)
        b_second += lane_sums(b_d * b_d, ROWS)
        tile += parts
    store_sums(p_partials, o_c, m_c, part, parts, channels, b_first, b_second)


@triton.jit
def batch_norm_relu_stats_kernel(
    p_x,  # [numel] in memory order
    p_partials,  # [2, channels, parts] float64
    p_weight,  # [channels] float32
    p_bias,  # [channels] float32
    p_running_mean,  # [channels] float32; unused where RUNNING is False
    p_running_var,  # [channels] float32; unused where RUNNING is False
    p_mean,  # [channels] float32
    p_var,  # [channels] float32
    p_saved,  # [5, channels] float32
    momentum,
    eps,
    samples,
    channels,
    inner,
    parts,
    RUNNING: tl.constexpr,
):
    # Computes mean and variance of a channel from its parts, and from them the numbers that the other passes need.
    # A program owns one channel.
    # Reads 16 bytes a part; writes a few numbers.
    # Accumulates in float64, in an order that does not depend on anything.
    c, per_channel = tl.program_id(0).to(tl.int64), tl.cast(samples, tl.int64) * inner
    b_pivot = _pivot_of(p_x, c, True, samples, channels, inner)
    b_delta = sum_of_parts(p_partials + c * parts, parts) / per_channel
    b_var = sum_of_parts(p_partials + (channels + c) * parts, parts) / per_channel - b_delta * b_delta
    b_var = tl.where(b_var < 0.0, 0.0, b_var)  # by a rounding; NaN stays
    b_mean = b_pivot.to(tl.float64) + b_delta
    b_inverse = 1.0 / tl.sqrt(b_var + eps)
    b_scale = tl.load(p_weight + c).to(tl.float64) * b_inverse
    b_shift = tl.load(p_bias + c).to(tl.float64) - b_delta * b_scale
    tl.store(p_mean + c, b_mean.to(tl.float32))
    tl.store(p_var + c, b_var.to(tl.float32))
    tl.store(p_saved + c, b_pivot)
    tl.store(p_saved + channels + c, b_scale.to(tl.float32))
    tl.store(p_saved + 2 * channels + c, b_shift.to(tl.float32))
    tl.store(p_saved + 3 * channels + c, b_inverse.to(tl.float32))
    tl.store(p_saved + 4 * channels + c, b_delta.to(tl.float32))
    if RUNNING:
        b_old = tl.load(p_running_mean + c).to(tl.float64)
        tl.store(p_running_mean + c, (b_old + momentum * (b_mean - b_old)).to(tl.float32))
        b_old = tl.load(p_running_var + c).to(tl.float64)
        b_unbiased = b_var * per_channel / tl.maximum(per_channel - 1, 1)
        tl.store(p_running_var + c, (b_old + momentum * (b_unbiased - b_old)).to(tl.float32))


@triton.jit
def batch_norm_relu_apply_kernel(
    p_x,  # [numel] in memory order
    p_residual,  # [numel]; unused where RESIDUAL is False
    p_saved,  # [5, channels] float32
    p_y,  # [numel]
    samples,
    channels,
    inner,
    parts,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # Computes y = max((x - pivot) * scale + shift + residual, 0).
    # A program owns every `parts`-th tile of BLOCK_S samples and BLOCK_I elements of BLOCK_C channels, from the end.
    # Reads x and the residual; writes y.
    # Accumulates nothing; arithmetic in float32.
    part, o_c, m_c, channels = own(parts, channels, GRAIN, BLOCK_C, BLOCK_I)
    b_pivot = row(p_saved, 0, channels, o_c, m_c)
    b_scale, b_shift = row(p_saved, 1, channels, o_c, m_c), row(p_saved, 2, channels, o_c, m_c)
    tile = tiles_of(samples, inner, BLOCK_S, BLOCK_I) - 1 - part
    while tile >= 0:
        o_x, m_x = channel_tile(tile, samples, channels, inner, o_c, GRAIN, BLOCK_S, BLOCK_I)
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_y = tl.fma(b_x - b_pivot, b_scale, b_shift)
        if RESIDUAL:
            b_y += tl.load(p_residual + o_x, mask=m_x, other=0.0).to(tl.float32)
        if RELU:
            b_y = tl.where(b_y <= 0.0, 0.0, b_y)  # keeps NaN
        tl.store(p_y + o_x, b_y.to(p_y.dtype.element_ty), mask=m_x)
        tile -= parts


# --- launchers -------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,  # [N, C, ...] float32, float16 or bfloat16
    weight: Tensor,  # [C] float32
    bias: Tensor,  # [C] float32
    residual: Tensor | None,  # [N, C, ...]
    running_mean: Tensor | None,  # [C] float32
    running_var: Tensor | None,  # [C] float32
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The activations, mean and variance, and ``[5, C]``: pivot, factor, offset, inverse deviation, mean - pivot."""
    channels_last = ch.is_channels_last(x)
    x = ch.dense(x, channels_last)
    added = x if residual is None else ch.dense(residual, channels_last)
    y, saved = ch.empty_dense(x, channels_last), x.new_empty((5, x.shape[1]), dtype=torch.float32)
    mean, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return y, mean.fill_(torch.nan), var.fill_(torch.nan), saved.fill_(torch.nan)
    numel, channels, inner = ch.layout(x, channels_last, x.shape[1])
    sizes = numel // (channels * inner), channels, inner
    sums, apply = sum_launch(numel, channels, inner, TILE), apply_launch(numel, channels, inner)
    partials = x.new_empty((2, channels, sums.parts), dtype=torch.float64)
    running = (mean, var) if running_mean is None else (running_mean, running_var)
    with on_device_of(x):
        enqueue(
            batch_norm_relu_sums_kernel, sums.programs(channels), x, partials, *sizes, sums.parts,
            **sums.sums(x.element_size()), num_warps=sums.num_warps,
        )  # fmt: skip
        enqueue(
            batch_norm_relu_stats_kernel, channels,
            x, partials, weight, bias, *running, mean, var, saved, momentum, eps, *sizes, sums.parts,
            RUNNING=running_mean is not None, num_warps=4,
        )  # fmt: skip
        enqueue(
            batch_norm_relu_apply_kernel, apply.programs(channels), x, added, saved, y, *sizes, apply.parts,
            RESIDUAL=residual is not None, RELU=relu, **apply.constants(), num_warps=apply.num_warps,
        )  # fmt: skip
    return y, mean, var, saved


def sum_launch(numel: int, channels: int, inner: int, tile: int) -> Launch:
    """Programs that are all there at once, unless each would have more than ``TILES`` tiles."""
    programs = PROGRAMS * cdiv(numel, PROGRAMS * tile * TILES)
    return few_kinds(Launch.choose(numel, channels, inner, tile, programs))


def apply_launch(numel: int, channels: int, inner: int) -> Launch:
    """As other passes over activations."""
    return few_kinds(Launch.choose(numel, channels, inner))


def few_kinds(launch: Launch) -> Launch:
    """16 elements fill a load, and further divisors would each be compiled for: layers of a network share kernels."""
    return replace(launch, grain=min(launch.grain, 16))


# --- ahead of time ---------------------------------------------------------------------------------------------------


_SIZES = {"samples": "i32", "channels": "i32", "inner": "i32", "parts": "i32"}
SHAPES = [
    ("bf16", 64, 1, False), ("bf16", 64, 1, True), ("fp16", 64, 1, False), ("fp32", 64, 1, True),
    ("fp32", 64, 1024, True), ("bf16", 64, 1024, False), ("fp32", 512, 49, False), ("bf16", 512, 16, True),
]  # fmt: skip
"""What is compiled ahead of time: dtype, channels, size of a plane (1: channels_last), whether there is a residual."""


def walk_types(dtype: str, activations: str, **others: str) -> dict[str, str]:
    """Types of a kernel that walks over activations."""
    return {**{f"p_{name}": f"*{dtype}" for name in activations.split()}, **others, **_SIZES}


def walk_sizes(channels: int, inner: int) -> tuple[int, int, int]:
    """128 images."""
    return 128 * channels * inner * (1024 if inner == 1 else 1), channels, inner


def _passes(dtype: str, channels: int, inner: int, residual: bool) -> list[AotVariant]:
    sizes = walk_sizes(channels, inner)
    sums, apply = sum_launch(*sizes, TILE), apply_launch(*sizes)
    constants = {"RESIDUAL": residual, "RELU": True, **apply.constants(), **ones(inner)}
    return [
        AotVariant.of(
            batch_norm_relu_sums_kernel, walk_types(dtype, "x", p_partials="*fp64"),
            {**sums.sums(BYTES[dtype]), **ones(inner)}, sums.num_warps,
        ),
        AotVariant.of(
            batch_norm_relu_apply_kernel, walk_types(dtype, "x residual y", p_saved="*fp32"), constants, apply.num_warps
        ),
    ]  # fmt: skip


_NUMBERS = ("weight", "bias", "running_mean", "running_var", "mean", "var", "saved")
AOT_VARIANTS = [
    *{str(variant): variant for shape in SHAPES for variant in _passes(*shape)}.values(),
    AotVariant.of(
        batch_norm_relu_stats_kernel,
        {
            "p_x": "*bf16", "p_partials": "*fp64", **{f"p_{name}": "*fp32" for name in _NUMBERS}, "momentum": "fp32",
            "eps": "fp32", **_SIZES,
        },
        {"RUNNING": True, **ones(1)},
        4,
    ),
]  # fmt: skip
