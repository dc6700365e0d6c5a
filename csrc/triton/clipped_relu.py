"""clipped_relu on the GPU: one read and one write each way. The backward serves batch_norm_clipped_relu too.

The equations are in ``bdfast/ops/clipped_relu.py``, the order of the bits in ``bdfast/ops/channels.py``. The forward
walks blocks of 512 elements in memory order, whatever their channels; the backward walks channels, so that a program
can add up the gradient of their bounds, and leaves one float64 a channel and part for a second launch to add in order:
reruns are bit-identical on every GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdfast.ops import channels as ch
from bdfast.triton_kernels.aot import AotVariant
from bdfast.triton_kernels.launch import enqueue
from bdfast.triton_kernels.rows import cdiv, on_device_of

LANES, BITS, BLOCK = tl.constexpr(ch.LANES), tl.constexpr(ch.BITS), tl.constexpr(ch.BLOCK)

BLOCKS = 4  # of 512 elements, in a program of the forward: 16 elements a thread
PARTS = 1024  # most partial sums of a channel; the tile in which the second launch adds them


@dataclass(frozen=True)
class Launch:
    """Shape of the backward's programs.

    Attributes:
        block_m: elements of a channel that a program holds at a time.
        block_c: channels that it holds.
        parts: programs that share a channel.
        num_warps: of a program.
    """

    block_m: int
    block_c: int
    parts: int
    num_warps: int = 4

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def choose(cls, numel: int, channels: int, inner: int) -> Launch:
        """Tiles of 2048 elements along what is next to each other in memory, and some 4096 programs in all."""
        block_c = min(64, triton.next_power_of_2(channels)) if inner == 1 else 1
        block_m = 2048 // block_c
        tiles = cdiv(numel // channels, block_m)
        return cls(block_m, block_c, max(1, min(tiles, PARTS, 4096 // cdiv(channels, block_c))))


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _elements(block, numel, channels, inner, BLOCKS: tl.constexpr):
    """Offset, mask and channel of the elements of a tile [BLOCKS, BITS, LANES] that starts at block ``block``."""
    o_block = tl.arange(0, BLOCKS)[:, None, None]
    o_in = o_block * BLOCK + tl.arange(0, BITS)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
    first = block * BLOCK
    o_x = first + o_in
    plane = (first // inner % channels).to(tl.int32)  # 64-bit division for the tile's start alone
    b_c = (plane + ((first % inner).to(tl.int32) + o_in) // inner) % channels
    return o_x, o_x < numel, b_c


@triton.jit
def _clip(b_t, b_z):
    """The clipped value, and the two conditions of the gradients."""
    b_r = tl.where(b_t <= 0.0, 0.0, b_t)
    m_clip = b_r > b_z
    b_y = tl.where(m_clip, b_z, b_r)
    b_y = tl.where(b_z != b_z, b_z, b_y)  # NaN of either side is kept
    return b_y, (b_r > 0.0) & (b_r <= b_z), m_clip


@triton.jit
def _store_bits(p_bits, m_bits, block, blocks, BLOCKS: tl.constexpr):
    """One bit an element of a tile [BLOCKS, BITS, LANES]."""
    b_words = tl.sum(m_bits.to(tl.int32) << tl.arange(0, BITS)[None, :, None], axis=1)
    o_block = block + tl.arange(0, BLOCKS)[:, None]
    tl.store(p_bits + o_block * LANES + tl.arange(0, LANES)[None, :], b_words, mask=o_block < blocks)


@triton.jit
def _load_bits(p_bits, o_x, m_x):
    """The bits of elements anywhere."""
    p_words = p_bits + (o_x // BLOCK) * LANES + o_x % LANES
    b_words = tl.load(p_words, mask=m_x, other=0)
    return ((b_words >> ((o_x % BLOCK) // LANES).to(tl.int32)) & 1) != 0


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
    BLOCKS: tl.constexpr,
):
    # Computes y = min(max(x, 0), bound) and the bits [0 < x <= bound], [max(x, 0) > bound].
    # A program owns BLOCKS blocks of 512 elements.
    # Reads x, writes y; one bit an element and gradient more.
    # Accumulates nothing; compares in float32.
    block = tl.program_id(0).to(tl.int64) * BLOCKS
    o_x, m_x, b_c = _elements(block, numel, channels, inner, BLOCKS)
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_z = tl.zeros_like(b_x) + limit
    if HAS_BOUND:
        b_z = tl.load(p_bound + b_c, mask=m_x, other=0.0).to(tl.float32)
    b_y, m_pass, m_clip = _clip(b_x, b_z)
    tl.store(p_y + o_x, b_y.to(p_y.dtype.element_ty), mask=m_x)
    blocks = tl.cdiv(numel, BLOCK)
    if PASS:
        _store_bits(p_pass, m_pass & m_x, block, blocks, BLOCKS)
    if CLIP:
        _store_bits(p_clip, m_clip & m_x, block, blocks, BLOCKS)


@triton.jit
def clipped_relu_bwd_kernel(
    p_grad,  # [numel] in memory order
    p_pass,  # [blocks, 16] int32; unused where PASS is False
    p_clip,  # [blocks, 16] int32; unused where CLIP is False
    p_scale,  # [channels] float32; unused where HAS_SCALE is False
    p_grad_x,  # [numel]; unused where PASS is False
    p_partials,  # [channels, parts] float64; unused where CLIP is False
    per_channel,  # elements of a channel
    channels,
    inner,
    parts,
    HAS_SCALE: tl.constexpr,
    PASS: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes dx = g * scale where the bit is set, and a part of dbound = sum of g where the other bit is.
    # A program owns every `parts`-th tile of BLOCK_M elements of BLOCK_C channels.
    # Reads g, writes dx; reads one bit an element and gradient.
    # Accumulates in float64.
    part = tl.program_id(0) % parts
    o_c = (tl.program_id(0) // parts) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    b_scale = tl.full((BLOCK_C,), 1.0, tl.float32)
    if HAS_SCALE:
        b_scale = tl.load(p_scale + o_c, mask=m_c, other=0.0)
    b_sum = tl.zeros((BLOCK_M, BLOCK_C), tl.float64)
    tile = part.to(tl.int64)
    while tile * BLOCK_M < per_channel:
        o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        o_row = (o_m // inner) * inner * channels + o_m % inner  # of the sample, and inside the plane
        o_x = o_row[:, None] + o_c.to(tl.int64)[None, :] * inner
        m_x = (o_m < per_channel)[:, None] & m_c[None, :]
        b_g = tl.load(p_grad + o_x, mask=m_x, other=0.0).to(tl.float32)
        if PASS:
            b_dx = tl.where(_load_bits(p_pass, o_x, m_x), b_g * b_scale[None, :], 0.0)
            tl.store(p_grad_x + o_x, b_dx.to(p_grad_x.dtype.element_ty), mask=m_x)
        if CLIP:
            b_sum += tl.where(_load_bits(p_clip, o_x, m_x), b_g, 0.0).to(tl.float64)
        tile += parts
    if CLIP:
        tl.store(p_partials + o_c.to(tl.int64) * parts + part, tl.sum(b_sum, axis=0), mask=m_c)


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
    with on_device_of(x):
        enqueue(
            clipped_relu_fwd_kernel, programs(numel),
            x, x if bound is None else bound.contiguous(), limit, y, *bit_planes(bits, x, need_x, need_bound),
            numel, channels, inner,
            HAS_BOUND=bound is not None, PASS=need_x, CLIP=need_bound, BLOCKS=BLOCKS, num_warps=4,
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
        return grad_x, torch.zeros(bounds if need_bound else 0, device=g.device)
    numel, channels, inner = ch.layout(g, channels_last, bounds if scale is None else scale.numel())
    launch = Launch.choose(numel, channels, inner)
    partials = g.new_empty((channels, launch.parts) if need_bound else (0,), dtype=torch.float64)
    grad_bound = g.new_empty(bounds if need_bound else 0, dtype=torch.float32)
    with on_device_of(g):
        enqueue(
            clipped_relu_bwd_kernel, cdiv(channels, launch.block_c) * launch.parts,
            g, *bit_planes(bits, g, need_x, need_bound), g if scale is None else scale, grad_x, partials,
            numel // channels, channels, inner, launch.parts,
            HAS_SCALE=scale is not None, PASS=need_x, CLIP=need_bound,
            BLOCK_M=launch.block_m, BLOCK_C=launch.block_c, num_warps=launch.num_warps,
        )  # fmt: skip
        if need_bound:
            enqueue(
                clipped_relu_sum_kernel, bounds,
                partials, grad_bound, partials.numel() // bounds, BLOCK=PARTS, num_warps=4,
            )  # fmt: skip
    return grad_x, grad_bound


def programs(numel: int) -> int:
    """Programs of a forward."""
    return cdiv(numel, BLOCKS * ch.BLOCK)


def bit_planes(bits: Tensor, unused: Tensor, need_x: bool, need_bound: bool) -> tuple[Tensor, Tensor]:
    """The bits of x's gradient and of the bound's; ``unused`` for one that is not needed."""
    return bits[0] if need_x else unused, bits[-1] if need_bound else unused


# --- ahead of time ---------------------------------------------------------------------------------------------------


def _variant(kernel: Any, types: dict[str, str], constants: dict[str, int | bool], **ones: int) -> AotVariant:
    return AotVariant.of(kernel, types, {**constants, **ones}, 4)


def _forward_variant(dtype: str, needs: bool, **ones: int) -> AotVariant:
    types = {
        "p_x": f"*{dtype}", "p_bound": "*fp32", "limit": "fp32", "p_y": f"*{dtype}", "p_pass": "*i32",
        "p_clip": "*i32", "numel": "i32", "channels": "i32", "inner": "i32",
    }  # fmt: skip
    constants = {"HAS_BOUND": True, "PASS": needs, "CLIP": needs, "BLOCKS": BLOCKS}
    return _variant(clipped_relu_fwd_kernel, types, constants, **ones)


def _backward_variant(dtype: str, launch: Launch, **ones: int) -> AotVariant:
    types = {
        "p_grad": f"*{dtype}", "p_pass": "*i32", "p_clip": "*i32", "p_scale": "*fp32", "p_grad_x": f"*{dtype}",
        "p_partials": "*fp64", "per_channel": "i32", "channels": "i32", "inner": "i32", "parts": "i32",
    }  # fmt: skip
    constants = {
        "HAS_SCALE": True, "PASS": True, "CLIP": True, "BLOCK_M": launch.block_m, "BLOCK_C": launch.block_c,
    }  # fmt: skip
    return _variant(clipped_relu_bwd_kernel, types, constants, **ones)


_STEM, _WIDE = Launch.choose(2**23, 64, 1024), Launch.choose(2**23, 64, 1)

AOT_VARIANTS = [
    *(_forward_variant(dtype, needs) for dtype in ("fp32", "bf16", "fp16") for needs in (True, False)),
    _forward_variant("fp32", True, inner=1),
    *(_backward_variant(dtype, _STEM) for dtype in ("fp32", "bf16", "fp16")),
    *(_backward_variant(dtype, _WIDE, inner=1) for dtype in ("fp32", "bf16")),
    _variant(
        clipped_relu_sum_kernel,
        {"p_partials": "*fp64", "p_grad_bound": "*fp32", "count": "i32"},
        {"BLOCK": PARTS},
    ),
]
