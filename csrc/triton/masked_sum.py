"""The gradient of a ReLU whose output two layers read, on the GPU: three reads and one write.

No public op: ``bdfast/runtime/relu_gradient.py`` has the equation and is the one caller. The sum is rounded to the
dtype of the gradients before it is masked, as it is where autograd adds them: the result is the same to the bit.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from bdfast.ops import channels as ch
from bdfast.triton_kernels.aot import AotVariant
from bdfast.triton_kernels.launch import enqueue
from bdfast.triton_kernels.rows import cdiv, on_device_of

BYTES = 4096  # of each operand, a program: two loads of 16 bytes a thread and operand
CHANNELS = 64  # most in a program whose second gradient is strided

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _masked(b_y, b_first, b_second):
    """The sum, rounded, where y is not <= 0. NaN is not, as in PyTorch's threshold_backward."""
    b_sum = (b_first.to(tl.float32) + b_second.to(tl.float32)).to(b_y.dtype)
    return tl.where(b_y <= 0.0, 0.0, b_sum).to(b_y.dtype)


@triton.jit
def masked_sum_kernel(
    p_y,  # [numel]
    p_first,  # [numel]
    p_second,  # [numel]
    p_out,  # [numel]
    numel,
    BLOCK: tl.constexpr,
):
    # Computes first + second where y > 0, zeros elsewhere.
    # A program owns BLOCK elements in memory order.
    # Reads y and both gradients; writes as much as one of them.
    # Accumulates nothing; the sum is float32, rounded once.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    o_x = tl.arange(0, BLOCK)
    m_x = o_x < numel - start
    b_y = tl.load(p_y + start + o_x, mask=m_x, other=0.0)
    b_first = tl.load(p_first + start + o_x, mask=m_x, other=0.0)
    b_second = tl.load(p_second + start + o_x, mask=m_x, other=0.0)
    tl.store(p_out + start + o_x, _masked(b_y, b_first, b_second), mask=m_x)


@triton.jit
def masked_strided_sum_kernel(
    p_y,  # [N, H, W, C]
    p_first,  # [N, H, W, C]
    p_second,  # [N, ceil(H / STRIDE_H), ceil(W / STRIDE_W), C]
    p_out,  # [N, H, W, C]
    pixels,  # N * H * W
    height,
    width,
    channels,
    GRAIN: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes first, plus second at every so many-th pixel, where y > 0; zeros elsewhere.
    # A program owns BLOCK_C channels of BLOCK_P pixels in a row.
    # Reads y and both gradients; writes as much as y.
    # Accumulates nothing; the sum is float32, rounded once.
    channels = channels // GRAIN * GRAIN  # unchanged, and now known to be a multiple: loads become vectors
    across = tl.cdiv(channels, BLOCK_C)
    start = (tl.program_id(0) // across).to(tl.int64) * BLOCK_P
    o_c = (tl.program_id(0) % across) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    o_p = tl.arange(0, BLOCK_P)[:, None]
    m_x = (o_p < pixels - start) & (o_c < channels)
    o_x = (start + o_p) * channels + o_c
    b_y = tl.load(p_y + o_x, mask=m_x, other=0.0)
    b_first = tl.load(p_first + o_x, mask=m_x, other=0.0)
    # 64-bit divisions for the first pixel alone.
    row = start // width
    b_w = (start - row * width).to(tl.int32) + o_p
    b_h = (row % height).to(tl.int32) + b_w // width
    b_n = row // height + b_h // height
    b_h, b_w = b_h % height, b_w % width
    o_row = b_n * tl.cdiv(height, STRIDE_H) + b_h // STRIDE_H
    o_second = (o_row * tl.cdiv(width, STRIDE_W) + b_w // STRIDE_W) * channels + o_c
    m_second = m_x & (b_h % STRIDE_H == 0) & (b_w % STRIDE_W == 0)
    b_second = tl.load(p_second + o_second, mask=m_second, other=0.0)
    tl.store(p_out + o_x, _masked(b_y, b_first, b_second), mask=m_x)


# --- launchers -------------------------------------------------------------------------------------------------------


def masked_sum(
    y: Tensor,  # [N, C, ...] float32, float16 or bfloat16
    first: Tensor,  # [N, C, ...] of the same dtype
    second: Tensor,  # [N, C, ...] of the same dtype
) -> Tensor:
    """first + second where y > 0, in the memory order of ``y``."""
    channels_last = ch.is_channels_last(y)
    y, first, second = (ch.dense(x, channels_last) for x in (y, first, second))
    out = ch.empty_dense(y, channels_last)
    if y.numel() > 0:
        block = BYTES // y.element_size()
        with on_device_of(y):
            enqueue(
                masked_sum_kernel, cdiv(y.numel(), block),
                y, first, second, out, y.numel(), BLOCK=block, num_warps=4,
            )  # fmt: skip
    return out


def masked_strided_sum(
    y: Tensor,  # [N, C, H, W] float32, float16 or bfloat16
    first: Tensor,  # [N, C, H, W] of the same dtype
    second: Tensor,  # [N, C, H', W'] of the same dtype
    stride: tuple[int, int],
) -> Tensor:
    """first, with second added at every ``stride``-th pixel, where y > 0; in channels_last."""
    y, first, second = (ch.dense(x, True) for x in (y, first, second))
    out = ch.empty_dense(y, True)
    n, c, h, w = y.shape
    if y.numel() > 0:
        constants = strided_constants(c, y.element_size(), stride)
        programs = cdiv(n * h * w, constants["BLOCK_P"]) * cdiv(c, constants["BLOCK_C"])
        with on_device_of(y):
            enqueue(
                masked_strided_sum_kernel, programs,
                y, first, second, out, n * h * w, h, w, c, **constants, num_warps=4,
            )  # fmt: skip
    return out


def strided_constants(channels: int, element_size: int, stride: tuple[int, int]) -> dict[str, int]:
    """Constants of the kernel whose second gradient is strided."""
    block_c = min(CHANNELS, int(triton.next_power_of_2(channels)))
    return {
        "GRAIN": math.gcd(channels, 16), "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        "BLOCK_P": BYTES // element_size // block_c, "BLOCK_C": block_c,
    }  # fmt: skip


# --- ahead of time ---------------------------------------------------------------------------------------------------


SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


def _pointers(dtype: str) -> dict[str, str]:
    return dict.fromkeys(("p_y", "p_first", "p_second", "p_out"), f"*{dtype}")


def _variant(dtype: str, *aligned: str) -> AotVariant:
    types = {**_pointers(dtype), "numel": "i32"}
    variant = AotVariant.of(masked_sum_kernel, types, {"BLOCK": BYTES // SIZES[dtype]}, 4)
    return AotVariant(variant.kernel, variant.types, variant.constants, 4, (*variant.aligned, *aligned))


def _strided_variant(dtype: str, channels: int) -> AotVariant:
    types = {**_pointers(dtype), **dict.fromkeys(("pixels", "height", "width", "channels"), "i32")}
    return AotVariant.of(masked_strided_sum_kernel, types, strided_constants(channels, SIZES[dtype], (2, 2)), 4)


AOT_VARIANTS = [
    *(_variant(dtype, "numel") for dtype in ("fp32", "bf16", "fp16")),
    *(_strided_variant(dtype, 64) for dtype in ("fp32", "bf16", "fp16")),
    _strided_variant("bf16", 12),
]
