"""What kernels over the rows of ``[N, C]`` logits share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from bdfast.backends.devices import on_device_of as on_device_of
from bdfast.triton_kernels.aot import AotVariant


@dataclass(frozen=True)
class Launch:
    """Shape of a program.

    Attributes:
        block_n: rows that a program holds at a time.
        block_c: classes that it holds at a time.
        tiles: of block_c classes, in a row.
        grain: a power of two up to 16 that divides C and the row stride. Triton itself only tells multiples of 16 from
            the rest, and would read rows of 1000 classes one by one instead of 16 bytes at a time.
        num_warps: of a program.
    """

    block_n: int
    block_c: int
    tiles: int
    grain: int
    num_warps: int

    @classmethod
    @functools.lru_cache(maxsize=1024)  # a choice takes longer than the kernel that it is for
    def choose(cls, classes: int, row_stride: int) -> Launch:
        """Narrow rows share a program, so that D3's 256 x 10 is one program and one launch; wide ones spread over many.

        The number of rows has no say: batches of all sizes share one compiled kernel. A thread holds 8 elements (16 of
        rows over 2048), so that several loads are in flight and nothing spills.
        """
        block_c = min(triton.next_power_of_2(classes), 4096)
        elements = 4096 if block_c <= 32 else max(1024, block_c)
        num_warps = 16 if block_c <= 32 else 4 if elements <= 2048 else 8
        tiles = cdiv(classes, block_c)
        return cls(elements // block_c, block_c, tiles, math.gcd(classes, row_stride, 16), num_warps)

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def spread(cls, classes: int, row_stride: int) -> Launch:
        """For kernels that add nothing over rows: narrow rows spread over many small programs, too.

        A thread then holds 4 elements. 50,000 rows of 10 classes are 12 programs on each of 132 multiprocessors, all
        there at once, instead of one or two: what has to be waited for is a read and a chain of shuffles, once.
        """
        launch = cls.choose(classes, row_stride)
        return replace(launch, block_n=launch.block_n // 8, num_warps=4) if launch.num_warps == 16 else launch

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def few_warps(cls, classes: int, row_stride: int) -> Launch:
        """For kernels that reduce rows, and add nothing over them: up to 1024 classes in programs of two warps.

        Instructions are what limits them. A maximum or a sum takes as many shuffles in each warp, however little of a
        row it holds: four warps execute a third more than two. One has too few to hide what it waits for.
        """
        launch = cls.spread(classes, row_stride)
        return replace(launch, num_warps=2) if 32 < launch.block_c <= 1024 else launch

    def tiles_of(self, rows: int) -> int:
        """Programs, where each owns one tile."""
        return cdiv(rows, self.block_n) * self.tiles

    def constants(self) -> dict[str, int]:
        """The arguments of both row kernels that depend on the launch."""
        return {"GRAIN": self.grain, "TILES": self.tiles, "BLOCK_N": self.block_n, "BLOCK_C": self.block_c}


@triton.jit
def load_label(p_target, o_n, m_n):
    """The label of each row. Before its logits are loaded: neither has to wait for the other."""
    return tl.load(p_target + o_n, mask=m_n, other=-1)


@triton.jit
def logit_of(p_logits, o_row, b_y, C):
    """The logit of each row's label, NaN where it is outside [0, C). After the row is loaded: then it is in a cache."""
    m_y = (b_y >= 0) & (b_y < C)
    b_zy = tl.load(p_logits + o_row + b_y, mask=m_y, other=0.0).to(tl.float32)
    return tl.where(m_y, b_zy, float("nan"))


@triton.jit
def load_tile(p_logits, o_row, m_n, o_c, C):
    """Logits of rows, -inf where there are none."""
    m_tile = m_n[:, None] & (o_c < C)[None, :]
    return tl.load(p_logits + o_row[:, None] + o_c[None, :], mask=m_tile, other=float("-inf")).to(tl.float32)


@triton.jit
def join_tile(b_max, b_sum, b_z):
    """Maximum and sum of exp(z - maximum) of rows that are a tile longer."""
    b_next = tl.maximum(b_max, tl.max(b_z, axis=1))
    # While a row has shown nothing but -inf, subtract 0: -inf - -inf would spoil a sum that may yet become finite.
    b_shift = tl.where(b_next == float("-inf"), 0.0, b_next)
    return b_next, b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_z - b_shift[:, None]), axis=1)


@triton.jit
def tile_stats(b_z):
    """What :func:`row_stats` gives, of rows of one tile that is there; and z - maximum and its exp, which it made."""
    b_max = tl.maximum(tl.max(b_z, axis=1), float("-inf"))  # as in join_tile, of NaN too
    b_below = b_z - tl.where(b_max == float("-inf"), 0.0, b_max)[:, None]
    b_exp = tl.exp(b_below)
    return b_max, tl.where(b_max == float("-inf"), float("nan"), tl.sum(b_exp, axis=1)), b_below, b_exp


@triton.jit
def row_stats(p_logits, o_row, m_n, C, TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Maximum and sum of exp(z - maximum) of each row, in one read: the sum is rescaled when the maximum moves."""
    b_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(TILES):
        b_z = load_tile(p_logits, o_row, m_n, tile * BLOCK_C + tl.arange(0, BLOCK_C), C)
        b_max, b_sum = join_tile(b_max, b_sum, b_z)
    return b_max, tl.where(b_max == float("-inf"), float("nan"), b_sum)


@triton.jit
def store_stats(p_stats, o_n, m_n, b_max, b_sum):
    """Keep what a backward wants of each row, in ``[N, 2]`` float32."""
    tl.store(p_stats + 2 * o_n, b_max, mask=m_n)
    tl.store(p_stats + 2 * o_n + 1, b_sum, mask=m_n)


@triton.jit
def load_stats(p_stats, o_n, m_n):
    """What :func:`store_stats` kept."""
    b_max = tl.load(p_stats + 2 * o_n, mask=m_n, other=0.0)
    b_sum = tl.load(p_stats + 2 * o_n + 1, mask=m_n, other=1.0)
    return b_max, b_sum


@triton.jit
def own_tile(TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and classes of a program that owns one tile."""
    program = tl.program_id(0).to(tl.int64)
    o_n = (program // TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = (program % TILES).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    return o_n, o_c


@triton.jit
def softmax_gradient(p_logits, p_grad, o_n, o_c, o_row, m_n, m_active, b_y, b_max, b_sum, b_weight, C):
    """Store a tile of weight * (softmax - onehot) of active rows and exact zeros of the others; the latter not read."""
    m_c = (o_c < C)[None, :]
    b_z = tl.load(p_logits + o_row[:, None] + o_c[None, :], mask=m_active[:, None] & m_c, other=0.0).to(tl.float32)
    b_grad = (b_weight / b_sum)[:, None] * tl.exp(b_z - b_max[:, None])
    b_grad = b_grad - tl.where(o_c[None, :] == b_y[:, None], b_weight[:, None], 0.0)
    b_grad = tl.where(m_active[:, None], b_grad, 0.0)
    p_tile = p_grad + o_n[:, None] * C + o_c[None, :]
    tl.store(p_tile, b_grad.to(p_grad.dtype.element_ty), mask=m_n[:, None] & m_c)


DTYPES_AND_CLASSES = [("fp32", 10), ("fp32", 1000), ("bf16", 32000), ("fp16", 200)]
"""What row kernels are compiled for ahead of time."""


def row_variant(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, int | bool],
    classes: int,
    choose: Callable[[int, int], Launch] = Launch.choose,
) -> AotVariant:
    """A row kernel as it is launched for contiguous rows of so many classes."""
    launch = choose(classes, classes)
    return AotVariant.of(kernel, types, {**constants, **launch.constants()}, launch.num_warps)


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up. Triton's own is made for kernels, and takes microseconds outside of one."""
    return -(-a // b)
