"""What kernels over the channels of activations share: tiles in memory order, tiles of channels, and the bits of both.

The order of bits is that of ``bdfast/ops/channels.py``. A size comes with a power of two that divides it (``GRAIN``):
Triton itself tells multiples of 16 from the rest at most, and what the compiler knows of an address decides the width
of its load, and whether the place of a bit has to be computed at all.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import triton
import triton.language as tl

from bdfast.ops import channels as ch
from bdfast.triton_kernels.rows import cdiv

LANES, BITS, BLOCK = tl.constexpr(ch.LANES), tl.constexpr(ch.BITS), tl.constexpr(ch.BLOCK)

PARTS = 2048  # most partial sums of a channel
TILE = 2048  # elements of a program at a time: 16 a thread, four loads of 16 bytes in flight
RUN = 512  # most of them in a row
SUMS = 2048  # bytes of a tile whose elements have a sum each: what 128 threads load at once


@dataclass(frozen=True)
class Launch:
    """Shape of the programs that walk over channels, where memory is [samples, channels, inner].

    Attributes:
        block_s: samples that a program holds at a time.
        block_c: channels that it holds.
        block_i: elements next to each other, of a sample and channel.
        grain: see :func:`grain`.
        parts: programs that share a channel.
        num_warps: of a program.
    """

    block_s: int
    block_c: int
    block_i: int
    grain: int
    parts: int
    num_warps: int

    @classmethod
    @functools.lru_cache(maxsize=1024)  # a choice takes longer than the kernel that it is for
    def choose(cls, numel: int, channels: int, inner: int, tile: int = TILE, programs: int = 4096) -> Launch:
        """Tiles of ``tile`` elements, along memory in runs of 64 and more, and some ``programs`` in all.

        No plane is cut into elements by a division: a plane is a row of the tile, padded to a power of two, or several
        rows, of the length that pads least.
        """
        samples = numel // (channels * inner)
        lengths = [min(triton.next_power_of_2(inner), length) for length in (RUN, RUN // 2)]
        block_i = min(lengths, key=lambda length: cdiv(inner, length) * length)
        block_c = min(triton.next_power_of_2(channels), max(1, 64 // block_i))
        block_s = min(triton.next_power_of_2(samples), tile // (block_c * block_i))
        tiles = cdiv(samples, block_s) * cdiv(inner, block_i)
        parts = max(1, min(tiles, PARTS, programs // cdiv(channels, block_c)))
        divisor = grain(channels, inner)
        # Loads of single elements keep an address each in registers: fewer of them a thread.
        return cls(block_s, block_c, block_i, divisor, parts, 4 if divisor >= 4 else 16)

    def programs(self, channels: int) -> int:
        """Programs in all."""
        return cdiv(channels, self.block_c) * self.parts

    def constants(self) -> dict[str, int]:
        """The arguments of a kernel that depend on the launch."""
        return {"GRAIN": self.grain, "BLOCK_S": self.block_s, "BLOCK_C": self.block_c, "BLOCK_I": self.block_i}

    def sums(self, element_size: int) -> dict[str, int]:
        """The constants of a kernel with sums, see :func:`lane_sums`."""
        rows = min(self.block_s, max(1, SUMS // (element_size * self.block_c * self.block_i)))
        return {"ROWS": rows, **self.constants()}


def grain(channels: int, inner: int) -> int:
    """A power of two that divides the size of what is innermost: a plane, or all channels where ``inner`` is 1."""
    return math.gcd(channels if inner == 1 else inner, ch.BLOCK)


def order(channels: int, inner: int) -> dict[str, int | bool]:
    """The constants of a kernel that walks over memory, see :func:`memory_tile`."""
    last = inner == 1
    return {"GRAIN": grain(channels, inner), "LAST": last, "CYCLE": last and ch.BLOCK % channels == 0}


# --- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def own_channels(parts, channels, BLOCK_C: tl.constexpr):
    """The part that a program has, its channels, and which of them are there."""
    o_c = (tl.program_id(0) // parts) * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.program_id(0) % parts, o_c, o_c < channels


@triton.jit
def tiles_of(samples, inner, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr):
    """Tiles of a channel."""
    return tl.cdiv(samples, BLOCK_S) * tl.cdiv(inner, BLOCK_I)


@triton.jit
def channel_tile(
    tile, samples, channels, inner, o_c, GRAIN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr
):  # fmt: skip
    """Offsets and mask [BLOCK_C, BLOCK_S, BLOCK_I] of a tile of the channels ``o_c``.

    Triton gives threads to the first of two axes that lie apart in memory: channels, so that they read long runs.
    """
    if BLOCK_I == 1:
        channels = channels // GRAIN * GRAIN  # unchanged, and now known to be a multiple, here and below
    else:
        inner = inner // GRAIN * GRAIN
    across = tl.cdiv(inner, BLOCK_I)
    o_s = (tile // across).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    first_i, o_i = (tile % across) * BLOCK_I, tl.arange(0, BLOCK_I)
    o_x = (o_s[None, :, None] * channels + o_c[:, None, None]) * inner + first_i + o_i[None, None, :]
    m_i = o_i < inner - first_i  # their sum might not fit 32 bits
    return o_x, (o_c < channels)[:, None, None] & (o_s < samples)[None, :, None] & m_i[None, None, :]


@triton.jit
def lane_sums(b_x, ROWS: tl.constexpr):
    """Sums [BLOCK_C, ROWS, BLOCK_I] of a tile [BLOCK_C, BLOCK_S, BLOCK_I].

    What is added lies in one thread: programs that walk over tiles exchange nothing until :func:`channel_sums`.
    """
    return tl.sum(tl.reshape(b_x, (b_x.shape[0], b_x.shape[1] // ROWS, ROWS, b_x.shape[2])), axis=1)


@triton.jit
def channel_sums(b_x):
    """Sums [BLOCK_C] of [BLOCK_C, ROWS, BLOCK_I]."""
    return tl.sum(tl.sum(b_x, axis=2), axis=1)


@triton.jit
def memory_tile(
    block, numel, channels, inner, GRAIN: tl.constexpr, LAST: tl.constexpr, CYCLE: tl.constexpr, BLOCKS: tl.constexpr
):
    """Offset, mask and channel of a tile [BLOCKS, BITS, LANES] that starts at block ``block``.

    Channels are of shape [BLOCKS, 1, 1] or [BLOCKS, BITS, 1] where a block, or a row of lanes, lies in one plane. LAST:
    ``inner`` is 1. CYCLE: and channels divide a block, so that the compiler knows which elements share one.
    """
    numel = numel // GRAIN * GRAIN
    o_block = tl.arange(0, BLOCKS)[:, None, None] * BLOCK
    o_row = o_block + tl.arange(0, BITS)[None, :, None] * LANES
    o_in = o_row + tl.arange(0, LANES)[None, None, :]
    first = block * BLOCK
    o_x = first + o_in
    if CYCLE:
        b_c = o_in % GRAIN
    elif LAST:
        channels = channels // GRAIN * GRAIN
        b_c = ((first % channels).to(tl.int32) // GRAIN * GRAIN + o_in) % channels  # a cast forgets what divides it
    else:
        o_run = o_block if GRAIN == BLOCK else o_row if GRAIN >= LANES else o_in
        plane = (first // inner % channels).to(tl.int32)  # 64-bit division for the tile's start alone
        b_c = (plane + ((first % inner).to(tl.int32) + o_run) // inner) % channels
    return o_x, o_x < numel, b_c


# --- bits ------------------------------------------------------------------------------------------------------------


@triton.jit
def store_bits(p_bits, m_bits, block, blocks, BLOCKS: tl.constexpr):
    """One bit an element of a tile [BLOCKS, BITS, LANES]."""
    b_words = tl.sum(m_bits.to(tl.int32) << tl.arange(0, BITS)[None, :, None], axis=1)
    o_block = block + tl.arange(0, BLOCKS)[:, None]
    tl.store(p_bits + o_block * LANES + tl.arange(0, LANES)[None, :], b_words, mask=o_block < blocks)


@triton.jit
def load_bits(p_bits, o_x, m_x):
    """The bits of elements anywhere: neighbours read the same words, as wide as their own loads."""
    b_words = tl.load(p_bits + (o_x // BLOCK) * LANES + o_x % LANES, mask=m_x, other=0)
    # The cast comes last: an offset beyond 2^31 would be a negative number, whose remainder is another one.
    return ((b_words >> ((o_x // LANES) % BITS).to(tl.int32)) & 1) != 0
