"""clipped_relu on the GPU: one read and one write each way. The backward serves batch_norm_clipped_relu too.

The equations are in ``bdfast/ops/clipped_relu.py``, the order of the bits in ``bdfast/ops/channels.py``. The forward
walks blocks of 512 elements in memory order, whatever their channels; the backward walks channels, so that a program
can add up the gradient of their bounds, and leaves one float64 a channel and part for a second launch to add in order:
reruns are bit-identical on every GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdfast.ops import channels as ch
from bdfast.triton_kernels.aot import AotVariant
from bdfast.triton_kernels.channels import (
    LANES,
    Launch,
    Walk,
    channel_sums,
    channel_tile,
    lane_sums,
    load_bits,
    load_channels,
    load_words,
    memory_tile,
    order,
    own_channels,
    plane_tile,
    store_bits,
    tiles_across,
    tiles_of,
)
from bdfast.triton_kernels.launch import enqueue
from bdfast.triton_kernels.rows import cdiv, on_device_of

PARTS = 1024  # of a sum, at a time


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _clip(b_t, b_z):
    """The clipped value, and the two conditions of the gradients."""
    b_r = tl.where(b_t <= 0.0, 0.0, b_t)
    m_clip = b_r > b_z
    b_y = tl.where(m_clip, b_z, b_r)
    b_y = tl.where(b_z != b_z, b_z, b_y)  # NaN of either side is kept
    return b_y, (b_r > 0.0) & (b_r <= b_z), m_clip


@triton.jit
def clipped_relu_fwd_kernel(
    p_x,  # [numel] in memory order
    p_bound,  # [channels] of the dtype that is computed in; unused where HAS_BOUND is False
    limit,  # the bound where HAS_BOUND is False
    p_y,  # [numel]
    p_pass,  # [blocks, 16] int32; unused where PASS is False
    p_clip,  # [blocks, 16] int32; unused where CLIP is False
    numel,
    channels,
    inner,
    HAS_BOUND: tl.constexpr,
    PASS: tl.constexpr,
    CLIP: tl.constexpr,
    GRAIN: tl.constexpr,
    LAST: tl.constexpr,
    CYCLE: tl.constexpr,
    PLANES: tl.constexpr,
    LOW: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # Computes y = min(max(x, 0), bound) and the bits [0 < x <= bound], [max(x, 0) > bound].
    # A program owns BLOCKS blocks of 512 elements.
    # Reads x, writes y; one bit an element and gradient more.
    # Accumulates nothing; compares in float32.
    block = tl.program_id(0).to(tl.int64) * BLOCKS
    o_x, m_x, b_c, b_plane = memory_tile(block, numel, channels, inner, GRAIN, LAST, CYCLE, PLANES, LOW, BLOCKS)
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_z = limit + 0.0  # which -0.0 is not
    if HAS_BOUND:
        b_z = load_channels(p_bound, b_c, b_plane, channels, PLANES).to(tl.float32) + 0.0
    b_y, m_pass, m_clip = _clip(b_x, b_z)
    tl.store(p_y + o_x, b_y.to(p_y.dtype.element_ty), mask=m_x)
    if PASS:
        store_bits(p_pass, m_pass & m_x, block, numel, LOW, BLOCKS)
    if CLIP:
        store_bits(p_clip, m_clip & m_x, block, numel, LOW, BLOCKS)


@triton.jit
def clipped_relu_bwd_kernel(
    p_grad,  # [numel] in memory order
    p_pass,  # [blocks, 16] int32; unused where PASS is False
    p_clip,  # [blocks, 16] int32; unused where CLIP is False
    p_scale,  # [channels] float32; unused where HAS_SCALE is False
    p_grad_x,  # [numel]; unused where PASS is False
    p_partials,  # [channels, parts] float64; unused where CLIP is False
    samples,
    channels,
    inner,
    parts,
    HAS_SCALE: tl.constexpr,
    PASS: tl.constexpr,
    CLIP: tl.constexpr,
    ROWS: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # Computes dx = g * scale where the bit is set, and a part of dbound = sum of g where the other bit is.
    # A program owns every `parts`-th tile of BLOCK_S samples and BLOCK_I elements of BLOCK_C channels.
    # Reads g, writes dx; reads one bit an element and gradient.
    # Accumulates in float64, in ROWS sums an element of a plane: one a sample would take half of the registers.
    part, o_c, m_c = own_channels(parts, channels, BLOCK_C)
    b_scale = tl.full((BLOCK_C,), 1.0, tl.float32)
    if HAS_SCALE:
        b_scale = tl.load(p_scale + o_c, mask=m_c, other=0.0)
    b_sum = tl.zeros((BLOCK_C, ROWS, BLOCK_I), tl.float64)
    tile = part
    while tile < tiles_of(samples, inner, BLOCK_S, BLOCK_I):
        o_x, m_x = channel_tile(tile, samples, channels, inner, o_c, GRAIN, BLOCK_S, BLOCK_I)
        b_g = tl.load(p_grad + o_x, mask=m_x, other=0.0).to(tl.float32)
        if PASS:
            b_dx = tl.where(load_bits(p_pass, o_x, m_x), b_g * b_scale[:, None, None], 0.0)
            tl.store(p_grad_x + o_x, b_dx.to(p_grad_x.dtype.element_ty), mask=m_x)
        if CLIP:
            b_sum += lane_sums(tl.where(load_bits(p_clip, o_x, m_x), b_g, 0.0).to(tl.float64), ROWS)
        tile += parts
    if CLIP:
        tl.store(p_partials + o_c.to(tl.int64) * parts + part, channel_sums(b_sum), mask=m_c)


@triton.jit
def clipped_relu_bwd_planes_kernel(
    p_grad,  # [numel] in memory order
    p_pass,  # [blocks, 16] int32; unused where PASS is False
    p_clip,  # [blocks, 16] int32; unused where CLIP is False
    p_scale,  # [channels] float32; unused where HAS_SCALE is False
    p_grad_x,  # [numel]; unused where PASS is False
    p_partials,  # [channels, parts] float64; unused where CLIP is False
    samples,
    channels,
    inner,
    parts,
    HAS_SCALE: tl.constexpr,
    PASS: tl.constexpr,
    CLIP: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LOW: tl.constexpr,
):
    # Computes what clipped_relu_bwd_kernel does, where planes are of many blocks of bits.
    # A program owns every `parts`-th tile of BLOCKS blocks, of BLOCK_S samples, of a channel.
    # Reads g, writes dx; reads one bit an element and gradient.
    # Accumulates in float64, in a sum for each element of a row of a tile.
    channel, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(p_scale + channel)
    b_sum = tl.zeros((LANES, LOW, BLOCKS), tl.float64)
    tiles = tl.cdiv(samples, BLOCK_S) * tiles_across(inner, GRAIN, BLOCKS, BLOCK_S)
    HALF: tl.constexpr = p_grad.dtype.element_ty.primitive_bitwidth == 16
    tile = part
    while tile < tiles:
        b_block, o_x, m_x, m_block = plane_tile(tile, samples, channels, inner, channel, GRAIN, LOW, BLOCKS, BLOCK_S)
        b_g = tl.load(p_grad + o_x, mask=m_x, other=0.0).to(tl.float32)
        if PASS:
            b_dx = tl.where(load_words(p_pass, b_block, m_block, LOW, HALF), b_g * scale, 0.0)
            tl.store(p_grad_x + o_x, b_dx.to(p_grad_x.dtype.element_ty), mask=m_x)
        if CLIP:
            b_sum += tl.sum(tl.where(load_words(p_clip, b_block, m_block, LOW, HALF), b_g, 0.0).to(tl.float64), axis=3)
        tile += parts
    if CLIP:
        tl.store(p_partials + channel.to(tl.int64) * parts + part, tl.sum(b_sum))


@triton.jit
def clipped_relu_sum_kernel(
    p_partials,  # [bounds, count] float64
    p_grad_bound,  # [bounds] float32
    count,
    BLOCK: tl.constexpr,
):
    # Computes the gradient of each bound from the parts that the backward left.
    # A program owns one bound.
    # Reads 8 bytes a part; writes 4.
    # Accumulates in float64, in an order fixed by BLOCK.
    row = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros((BLOCK,), tl.float64)
    first = tl.zeros((), tl.int32)
    while first < count:
        o_p = first + tl.arange(0, BLOCK)
        b_sum += tl.load(p_partials + row * count + o_p, mask=o_p < count, other=0.0)
        first += BLOCK
    tl.store(p_grad_bound + row, tl.sum(b_sum, axis=0).to(tl.float32))


# --- launchers -------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,  # [N, C, ...] float32, float16 or bfloat16
    bound: Tensor | None,  # [] or [C] float32
    limit: float,
    need_x: bool,
    need_bound: bool,
) -> tuple[Tensor, Tensor]:
    """Clipped activations of the layout of ``x``, and the bits ``[gradients, blocks, 16]``."""
    channels_last = ch.is_channels_last(x)
    x = ch.dense(x, channels_last)
    y, bits = ch.empty_dense(x, channels_last), ch.empty_bits(x, need_x + need_bound)
    if x.numel() == 0:
        return y, bits
    numel, channels, inner = ch.layout(x, channels_last, 1 if bound is None else bound.numel())
    constants = order(channels, inner, x.element_size())
    with on_device_of(x):
        enqueue(
            clipped_relu_fwd_kernel, programs(numel, constants),
            x, x if bound is None else bound.contiguous(), limit, y, *bit_planes(bits, x, need_x, need_bound),
            numel, channels, inner, HAS_BOUND=bound is not None, PASS=need_x, CLIP=need_bound,
            **constants, num_warps=4,
        )  # fmt: skip
    return y, bits


def backward(
    grad: Tensor,  # [N, C, ...]
    bits: Tensor,  # int32 [gradients, blocks, 16]
    scale: Tensor | None,  # [C] float32
    channels_last: bool,
    need_x: bool,
    need_bound: bool,
    bounds: int,
) -> tuple[Tensor, Tensor]:
    """Gradient of x, of the layout of ``x``, and of the bounds, ``[bounds]`` float32; empty where not needed."""
    g, bits = ch.dense(grad, channels_last), bits.contiguous()
    grad_x = ch.empty_dense(g, channels_last) if need_x else g.new_empty(0)
    if g.numel() == 0:
        return grad_x, g.new_zeros(bounds if need_bound else 0, dtype=torch.float32)
    numel, channels, inner = ch.layout(g, channels_last, bounds if scale is None else scale.numel())
    kernel, count, parts, warps, constants = _backward_launch(numel, channels, inner, g.element_size())
    partials = g.new_empty((channels, parts) if need_bound else (0,), dtype=torch.float64)
    grad_bound = g.new_empty(bounds if need_bound else 0, dtype=torch.float32)
    with on_device_of(g):
        enqueue(
            kernel, count,
            g, *bit_planes(bits, g, need_x, need_bound), g if scale is None else scale, grad_x, partials,
            numel // (channels * inner), channels, inner, parts,
            HAS_SCALE=scale is not None, PASS=need_x, CLIP=need_bound,
            **constants, num_warps=warps,
        )  # fmt: skip
        if need_bound:
            enqueue(
                clipped_relu_sum_kernel, bounds,
                partials, grad_bound, partials.numel() // bounds, BLOCK=PARTS, num_warps=4,
            )  # fmt: skip
    return grad_x, grad_bound


def _backward_launch(
    numel: int, channels: int, inner: int, element_size: int
) -> tuple[Any, int, int, int, dict[str, int]]:
    """Kernel of the backward, its programs, those that share a channel, warps and constants."""
    walk = Walk.choose(numel, channels, inner, element_size)
    if walk is not None:
        return clipped_relu_bwd_planes_kernel, channels * walk.parts, walk.parts, 4, walk.constants
    launch = Launch.choose(numel, channels, inner)
    constants = launch.sums(element_size)
    return clipped_relu_bwd_kernel, launch.programs(channels), launch.parts, launch.num_warps, constants


def programs(numel: int, constants: dict[str, int | bool]) -> int:
    """Programs of a forward with these constants."""
    return int(cdiv(numel, constants["BLOCKS"] * ch.BLOCK))


def bit_planes(bits: Tensor, unused: Tensor, need_x: bool, need_bound: bool) -> tuple[Tensor, Tensor]:
    """The bits of x's gradient and of the bound's; ``unused`` for one that is not needed."""
    return bits[0] if need_x else unused, bits[-1] if need_bound else unused


# --- ahead of time ---------------------------------------------------------------------------------------------------


BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def _forward_variant(dtype: str, needs: bool, inner: int = 1024) -> AotVariant:
    types = {
        "p_x": f"*{dtype}", "p_bound": "*fp32", "limit": "fp32", "p_y": f"*{dtype}", "p_pass": "*i32",
        "p_clip": "*i32", "numel": "i32", "channels": "i32", "inner": "i32",
    }  # fmt: skip
    constants = {"HAS_BOUND": True, "PASS": needs, "CLIP": needs}
    constants |= {**order(64, inner, BYTES[dtype]), **ones(inner)}
    return AotVariant.of(clipped_relu_fwd_kernel, types, constants, 4)


def ones(inner: int) -> dict[str, int]:
    """What Triton's launcher makes a constant."""
    return {"inner": 1} if inner == 1 else {}


def _backward_variant(dtype: str, channels: int, inner: int) -> AotVariant:
    types = {
        "p_grad": f"*{dtype}", "p_pass": "*i32", "p_clip": "*i32", "p_scale": "*fp32", "p_grad_x": f"*{dtype}",
        "p_partials": "*fp64", "samples": "i32", "channels": "i32", "inner": "i32", "parts": "i32",
    }  # fmt: skip
    numel = 128 * channels * inner * (1024 if inner == 1 else 1)
    kernel, _, _, warps, constants = _backward_launch(numel, channels, inner, BYTES[dtype])
    constants = {"HAS_SCALE": True, "PASS": True, "CLIP": True, **constants, **ones(inner)}
    return AotVariant.of(kernel, types, constants, warps)


AOT_VARIANTS = [
    *(_forward_variant(dtype, needs) for dtype in ("fp32", "bf16", "fp16") for needs in (True, False)),
    *(_forward_variant("fp32", True, inner) for inner in (12544, 784, 49, 1)),
    _forward_variant("bf16", True, 12544),
    *(_backward_variant(dtype, 64, 1024) for dtype in ("fp32", "bf16", "fp16")),
    *(_backward_variant(dtype, 64, 12544) for dtype in ("fp32", "bf16")),
    *(_backward_variant("fp32", 512, inner) for inner in (784, 49, 16)),
    *(_backward_variant(dtype, 64, 1) for dtype in ("fp32", "bf16")),
    AotVariant.of(
        clipped_relu_sum_kernel,
        {"p_partials": "*fp64", "p_grad_bound": "*fp32", "count": "i32"},
        {"BLOCK": PARTS},
        4,
    ),
]
