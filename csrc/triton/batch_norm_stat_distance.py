"""batch_norm_stat_distance on the GPU: one read forward, one read and one write backward.

The equations are in ``bdfast/ops/batch_norm_stat_distance.py``; tiles are those of clipped_relu's backward, which walks
channels. Each program leaves two float64 sums a channel for the next launch to add in order, the last program of which
adds the channels: reruns are bit-identical.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdfast.ops import channels as ch
from bdfast.triton_kernels.aot import AotVariant
from bdfast.triton_kernels.channels import Launch, channel_sums, channel_tile, lane_sums, own_channels, tiles_of
from bdfast.triton_kernels.clipped_relu import BYTES, ones
from bdfast.triton_kernels.launch import enqueue
from bdfast.triton_kernels.rows import on_device_of

# Of the forward, which writes next to nothing: all programs are there at once, have several tiles each, and leave the
# second launch one sum in four.
TILE, PROGRAMS = 4096, 512

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def batch_norm_stat_distance_fwd_kernel(
    p_x,  # [numel] in memory order
    p_running_mean,  # [channels] float32
    p_partials,  # [2, channels, parts] float64
    p_done,  # one int32, set to 0 for the next launch
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
    # Computes a part of the sums of x - running_mean and of its squares.
    # A program owns every `parts`-th tile of BLOCK_S samples and BLOCK_I elements of BLOCK_C channels.
    # Reads x; writes 16 bytes a channel.
    # Accumulates in float64; subtracting first keeps the variance exact.
    if tl.program_id(0) == 0:
        tl.store(p_done, 0)
    part, o_c, m_c = own_channels(parts, channels, BLOCK_C)
    b_pivot = tl.load(p_running_mean + o_c, mask=m_c, other=0.0).to(tl.float64)
    b_first = tl.zeros((BLOCK_C, ROWS, BLOCK_I), tl.float64)
    b_second = tl.zeros((BLOCK_C, ROWS, BLOCK_I), tl.float64)
    tile = part
    while tile < tiles_of(samples, inner, BLOCK_S, BLOCK_I):
        o_x, m_x = channel_tile(tile, samples, channels, inner, o_c, GRAIN, BLOCK_S, BLOCK_I)
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_d = tl.where(m_x, b_x.to(tl.float64) - b_pivot[:, None, None], 0.0)
        b_first += lane_sums(b_d, ROWS)
        b_second += lane_sums(b_d * b_d, ROWS)
        tile += parts
    o_p = o_c.to(tl.int64) * parts + part
    tl.store(p_partials + o_p, channel_sums(b_first), mask=m_c)
    tl.store(p_partials + channels * parts + o_p, channel_sums(b_second), mask=m_c)


@triton.jit
def batch_norm_stat_distance_stats_kernel(
    p_partials,  # [2, channels, parts] float64
    p_running_mean,  # [channels] float32
    p_running_var,  # [channels] float32
    p_stats,  # [2, channels] float64
    p_distances,  # [channels] float64
    p_distance,  # one float32
    p_done,  # one int32: programs that have written theirs
    per_channel,
    channels,
    parts,
    BLOCK: tl.constexpr,
):
    # Computes mean, variance and distance of a channel from the parts that the forward left, and the sum of distances.
    # A program owns one channel; the last one to be done adds all distances, in an order that does not depend on which.
    # Reads 16 bytes a part; writes 24.
    # Accumulates in float64, in an order fixed by BLOCK, which holds all parts.
    c = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BLOCK)
    p_first = p_partials + c * parts + o_p
    b_first = tl.sum(tl.load(p_first, mask=o_p < parts, other=0.0), axis=0) / per_channel
    p_second = p_first + channels * parts
    b_second = tl.sum(tl.load(p_second, mask=o_p < parts, other=0.0), axis=0) / per_channel
    b_var = b_second - b_first * b_first
    b_excess = b_var - tl.load(p_running_var + c).to(tl.float64)
    tl.store(p_stats + c, tl.load(p_running_mean + c).to(tl.float64) + b_first)
    tl.store(p_stats + channels + c, b_var)
    tl.store(p_distances + c, b_first * b_first + b_excess * b_excess)
    tl.debug_barrier()  # the atomic publishes what was written before it
    if tl.atomic_add(p_done, 1, sem="acq_rel") == channels - 1:
        b_sum = tl.zeros((BLOCK,), tl.float64)
        first = tl.zeros((), tl.int32)
        while first < channels:
            o_c = first + tl.arange(0, BLOCK)
            b_sum += tl.load(p_distances + o_c, mask=o_c < channels, other=0.0, cache_modifier=".cg")
            first += BLOCK
        tl.store(p_distance, tl.sum(b_sum, axis=0).to(tl.float32))


@triton.jit
def batch_norm_stat_distance_bwd_kernel(
    p_x,  # [numel] in memory order
    p_running_mean,  # [channels] float32
    p_running_var,  # [channels] float32
    p_stats,  # [2, channels] float64
    p_grad,  # one float32
    p_grad_x,  # [numel]
    samples,
    channels,
    inner,
    parts,
    GRAIN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # Computes dx = slope * (x - mean) + shift.
    # A program owns every `parts`-th tile of BLOCK_S samples and BLOCK_I elements of BLOCK_C channels.
    # Reads x; writes dx.
    # Accumulates nothing; computes in float64.
    part, o_c, m_c = own_channels(parts, channels, BLOCK_C)
    b_mean = tl.load(p_stats + o_c, mask=m_c, other=0.0)
    b_var = tl.load(p_stats + channels + o_c, mask=m_c, other=0.0)
    factor = 2.0 * tl.load(p_grad).to(tl.float64) / samples / inner
    b_slope = 2.0 * factor * (b_var - tl.load(p_running_var + o_c, mask=m_c, other=0.0).to(tl.float64))
    b_shift = factor * (b_mean - tl.load(p_running_mean + o_c, mask=m_c, other=0.0).to(tl.float64))
    tile = part
    while tile < tiles_of(samples, inner, BLOCK_S, BLOCK_I):
        o_x, m_x = channel_tile(tile, samples, channels, inner, o_c, GRAIN, BLOCK_S, BLOCK_I)
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_dx = b_slope[:, None, None] * (b_x.to(tl.float64) - b_mean[:, None, None]) + b_shift[:, None, None]
        tl.store(p_grad_x + o_x, b_dx.to(tl.float32).to(p_grad_x.dtype.element_ty), mask=m_x)
        tile += parts


# --- launchers -------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,  # [N, C, ...] float32, float16 or bfloat16
    mean: Tensor,  # [C] float32
    var: Tensor,  # [C] float32
) -> tuple[Tensor, Tensor]:
    """The distance, and the batch's means and variances ``[2, C]``."""
    channels_last = ch.is_channels_last(x)
    x = ch.dense(x, channels_last)
    stats = x.new_empty((2, x.shape[1]), dtype=torch.float64)
    distance = x.new_empty((), dtype=torch.float32)
    if x.numel() == 0:
        return distance.fill_(torch.nan), stats.fill_(torch.nan)
    numel, channels, inner = ch.layout(x, channels_last, x.shape[1])
    launch = Launch.choose(numel, channels, inner, TILE, PROGRAMS)
    partials = x.new_empty((2, channels, launch.parts), dtype=torch.float64)
    distances, done = x.new_empty(channels, dtype=torch.float64), x.new_empty((), dtype=torch.int32)
    with on_device_of(x):
        enqueue(
            batch_norm_stat_distance_fwd_kernel, launch.programs(channels),
            x, mean, partials, done, numel // (channels * inner), channels, inner, launch.parts,
            **launch.sums(x.element_size()), num_warps=launch.num_warps,
        )  # fmt: skip
        enqueue(
            batch_norm_stat_distance_stats_kernel, channels,
            partials, mean, var, stats, distances, distance, done, numel // channels, channels, launch.parts,
            BLOCK=PROGRAMS, num_warps=4,
        )  # fmt: skip
    return distance, stats


def backward(
    x: Tensor,  # [N, C, ...]
    mean: Tensor,  # [C] float32
    var: Tensor,  # [C] float32
    stats: Tensor,  # [2, C] float64
    grad: Tensor,  # [] float32
) -> Tensor:
    """Gradient of x, in the memory order of x."""
    channels_last = ch.is_channels_last(x)
    x, stats = ch.dense(x, channels_last), stats.contiguous()
    grad_x = ch.empty_dense(x, channels_last)
    if x.numel() == 0:
        return grad_x
    numel, channels, inner = ch.layout(x, channels_last, x.shape[1])
    launch = Launch.choose(numel, channels, inner)
    with on_device_of(x):
        enqueue(
            batch_norm_stat_distance_bwd_kernel, launch.programs(channels),
            x, mean, var, stats, grad.float(), grad_x, numel // (channels * inner), channels, inner, launch.parts,
            **launch.constants(), num_warps=launch.num_warps,
        )  # fmt: skip
    return grad_x


# --- ahead of time ---------------------------------------------------------------------------------------------------


_SIZES = {"samples": "i32", "channels": "i32", "inner": "i32", "parts": "i32"}
_STATISTICS = {"p_running_mean": "*fp32", "p_running_var": "*fp32", "p_stats": "*fp64"}


def _both_ways(dtype: str, channels: int, inner: int) -> list[AotVariant]:
    forward_types = {"p_x": f"*{dtype}", "p_running_mean": "*fp32", "p_partials": "*fp64", "p_done": "*i32", **_SIZES}
    backward_types = {"p_x": f"*{dtype}", **_STATISTICS, "p_grad": "*fp32", "p_grad_x": f"*{dtype}", **_SIZES}
    sizes = 128 * channels * inner * (1024 if inner == 1 else 1), channels, inner
    first, second = Launch.choose(*sizes, TILE, PROGRAMS), Launch.choose(*sizes)
    sums, plain = {**first.sums(BYTES[dtype]), **ones(inner)}, {**second.constants(), **ones(inner)}
    return [
        AotVariant.of(batch_norm_stat_distance_fwd_kernel, forward_types, sums, first.num_warps),
        AotVariant.of(batch_norm_stat_distance_bwd_kernel, backward_types, plain, second.num_warps),
    ]


AOT_VARIANTS = [
    *(variant for dtype in ("fp32", "bf16", "fp16") for variant in _both_ways(dtype, 64, 1024)),
    *(variant for inner in (49, 16) for variant in _both_ways("fp32", 512, inner)),
    *_both_ways("fp32", 64, 1),
    AotVariant.of(
        batch_norm_stat_distance_stats_kernel,
        {
            "p_partials": "*fp64", **_STATISTICS, "p_distances": "*fp64", "p_distance": "*fp32", "p_done": "*i32",
            "per_channel": "i32", "channels": "i32", "parts": "i32",
        },
        {"BLOCK": PROGRAMS},
        4,
    ),
]  # fmt: skip
