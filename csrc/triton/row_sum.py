"""The scalar loss from the losses of rows: what the programs of a forward share when they sum over rows.

Sums over rows are float64 and their order depends on the shape alone, so that reruns are bit-identical on every GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bdfast.triton_kernels.aot import AotVariant
from bdfast.triton_kernels.launch import enqueue
from bdfast.triton_kernels.rows import cdiv

MAX_PROGRAMS = 1024  # of a forward that sums; also the tile in which one program adds their partial sums


@triton.jit
def reduced(b_total, N, MEAN: tl.constexpr):
    """The scalar loss from the float64 sum over rows; 0 / 0 = NaN is the mean of an empty batch."""
    b_loss = b_total
    if MEAN:
        b_loss = b_total / N
    return b_loss.to(tl.float32)


@triton.jit
def store_sum(b_total, p_loss, p_partials, N, MEAN: tl.constexpr, ONE_PROGRAM: tl.constexpr):
    """What a program does with its float64 sums: the loss where it is the only one, else its part of it."""
    b_sum_of_rows = tl.sum(b_total, axis=0)
    if ONE_PROGRAM:
        tl.store(p_loss, reduced(b_sum_of_rows, N, MEAN))
    else:
        tl.store(p_partials + tl.program_id(0), b_sum_of_rows)


@triton.jit
def row_sum_kernel(
    p_partials,  # [programs] float64
    p_loss,  # one float32
    programs,
    N,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Computes the scalar loss from the sums that the programs of a forward left.
    # A single program owns them all.
    # Reads 8 bytes a program of the forward; writes 4.
    # Accumulates in float64, in an order fixed by BLOCK.
    o_p = tl.arange(0, BLOCK)
    b_partials = tl.load(p_partials + o_p, mask=o_p < programs, other=0.0)
    tl.store(p_loss, reduced(tl.sum(b_partials, axis=0), N, MEAN))


def programs_for(rows: int, block_n: int) -> int:
    """Programs of a forward whose programs take ``block_n`` rows at a time."""
    return max(1, min(cdiv(rows, block_n), MAX_PROGRAMS))


def finish(
    partials: Tensor,  # [programs] float64
    loss: Tensor,  # one float32, written
    programs: int,
    rows: int,
    mean: bool,
) -> None:
    """Add what the programs left; on the current device."""
    enqueue(row_sum_kernel, 1, partials, loss, programs, rows, MEAN=mean, BLOCK=MAX_PROGRAMS, num_warps=4)


AOT_VARIANTS = [
    AotVariant.of(
        row_sum_kernel,
        {"p_partials": "*fp64", "p_loss": "*fp32", "programs": "i32", "N": "i32"},
        {"MEAN": True, "BLOCK": MAX_PROGRAMS},
        4,
    )
]
