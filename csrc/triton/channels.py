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
LOW = 8  # rows of 16 elements that a warp reads at a time, as four lanes of four, or two lanes of eight and two blocks
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


@functools.lru_cache(maxsize=1024)
def order(channels: int, inner: int, element_size: int) -> dict[str, int | bool]:
    """The constants of a kernel that walks over memory, see :func:`memory_tile`."""
    last, divisor = inner == 1, grain(channels, inner)
    blocks = 8 if divisor * element_size >= 16 and element_size == 2 else 4  # four loads of 16 bytes a thread
    return {
        "GRAIN": divisor,
        "LAST": last,
        "CYCLE": last and ch.BLOCK % channels == 0,
        "PLANES": 0 if last else planes(channels, inner, blocks * ch.BLOCK),
        "LOW": min(2 * divisor, LOW),
        "BLOCKS": blocks,
    }


@dataclass(frozen=True)
class Walk:
    """How programs walk over the blocks that planes touch, for planes of many blocks, see :func:`plane_tile`.

    Attributes:
        parts: programs that share a channel.
        constants: the arguments of a kernel that depend on the walk.
    """

    parts: int
    constants: dict[str, int]

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def choose(cls, numel: int, channels: int, inner: int, element_size: int, programs: int = 4096) -> Walk | None:
        """None where the blocks of a plane hold much of its neighbours, or are not read 16 bytes at a time."""
        divisor, blocks = grain(channels, inner), 16 // element_size
        touched = cdiv(inner - divisor, ch.BLOCK) + 1
        if inner == 1 or divisor * element_size < 16 or touched * ch.BLOCK > 1.25 * inner:
            return None
        samples = numel // (channels * inner)
        fewest = max(1, blocks // triton.next_power_of_2(samples))
        lengths = [length for length in (4, 2, 1) if length >= fewest] or [fewest]
        length = min(lengths, key=lambda length: cdiv(touched, length) * length)
        tiles = cdiv(samples, blocks // length) * cdiv(touched, length)
        parts = max(1, min(tiles, PARTS, programs // channels))
        return cls(parts, {"GRAIN": divisor, "BLOCKS": blocks, "BLOCK_S": blocks // length, "LOW": LOW})


def planes(channels: int, inner: int, tile: int) -> int:
    """Most planes that a tile of memory touches where that is one or two, else 0."""
    if channels == 1:
        return 1
    touched = cdiv(inner - math.gcd(inner, tile) + tile, inner)  # a plane may begin that far before the tile
    return touched if touched <= 2 else 0


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
    block, numel, channels, inner, GRAIN: tl.constexpr, LAST: tl.constexpr, CYCLE: tl.constexpr, PLANES: tl.constexpr,
    LOW: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Offset and mask of a tile [LANES, LOW, BLOCKS, BITS // LOW] that starts at block ``block``, channel and plane.

    Axes are in the order in which Triton gives them to elements of a load, lanes, warps and registers: whatever is
    loaded of a tile has one layout, which needs no exchange of elements, and a block lies in one warp, where its bits
    are added up. Bit ``b`` of a block is at ``b % LOW`` and ``b // LOW``.

    LAST: ``inner`` is 1. CYCLE: and channels divide a block, so that the compiler knows which elements share one.
    Otherwise with PLANES, a tile lies in so many planes: the channel is that of the first, and planes count from there.
    """
    numel = numel // GRAIN * GRAIN
    o_block = tl.arange(0, BLOCKS)[None, None, :, None] * BLOCK
    b_bit = tl.arange(0, LOW)[None, :, None, None] + tl.arange(0, BITS // LOW)[None, None, None, :] * LOW
    o_row = o_block + b_bit * LANES
    o_in = o_row + tl.arange(0, LANES)[:, None, None, None]
    first = block * BLOCK
    o_x = first + o_in
    b_plane = 0
    if CYCLE:
        b_c = o_in % GRAIN
    elif LAST:
        channels = channels // GRAIN * GRAIN
        b_c = ((first % channels).to(tl.int32) // GRAIN * GRAIN + o_in) % channels  # a cast forgets what divides it
    else:
        if numel.dtype == tl.int32:
            first = first.to(tl.int32)  # and with it the division
        plane = first // inner
        before = first - plane * inner  # elements of that plane that lie before the tile
        b_c = (plane % channels).to(tl.int32)
        o_run = o_block if GRAIN == BLOCK else o_row if GRAIN >= LANES else o_in  # where a plane may begin
        if PLANES == 2:
            b_plane = (o_run >= tl.minimum(inner - before, BLOCKS * BLOCK).to(tl.int32)).to(tl.int32)
        elif PLANES == 0:
            b_c = (b_c + (before.to(tl.int32) + o_run) // inner) % channels
            b_c = tl.broadcast_to(b_c, o_in.shape)  # a load of another shape would have another layout
    return o_x, o_x < numel, b_c, b_plane


@triton.jit
def load_channels(p_values, b_c, b_plane, channels, PLANES: tl.constexpr):
    """The channel's value for each element of a memory tile: a load a plane where there are one or two."""
    b_values = tl.load(p_values + b_c)
    if PLANES == 2:
        b_next = tl.load(p_values + tl.where(b_c + 1 == channels, 0, b_c + 1))
        b_values = tl.where(b_plane == 0, b_values, b_next)
    return b_values


@triton.jit
def tiles_across(inner, GRAIN: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Plane tiles of a plane, which may begin anywhere in a block."""
    rest = inner - GRAIN
    return tl.cdiv(rest // BLOCK + tl.where(rest % BLOCK == 0, 1, 2), BLOCKS // BLOCK_S)


@triton.jit
def plane_tile(
    tile, samples, channels, inner, channel, GRAIN: tl.constexpr, LOW: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Blocks [1, 1, BLOCKS, 1] of a tile of BLOCK_S planes of a channel; offsets and mask of their elements.

    Elements are [LANES, LOW, BLOCKS, BITS // LOW], as in :func:`memory_tile`, so that a word of bits is read once for
    all that a thread has of it. Blocks begin where blocks of bits do: the mask leaves a plane's neighbours out.
    """
    inner = inner // GRAIN * GRAIN
    across = tiles_across(inner, GRAIN, BLOCKS, BLOCK_S)
    o_k = tl.arange(0, BLOCKS)[None, None, :, None]
    o_s = (tile // across).to(tl.int64) * BLOCK_S + o_k % BLOCK_S
    first = ((o_s * channels + channel) * inner).to(tl.uint64)  # element of each plane
    o_b = (tile % across).to(tl.int64) * (BLOCKS // BLOCK_S) + o_k // BLOCK_S  # of the plane's blocks
    before = (first % BLOCK).to(tl.int32) // GRAIN * GRAIN  # elements of others in the plane's first block
    begin = tl.where(o_b == 0, before, 0)
    end = tl.minimum(inner - o_b * BLOCK + before, BLOCK).to(tl.int32) // GRAIN * GRAIN
    end = tl.where(o_s < samples, end, 0)
    b_bit = tl.arange(0, LOW)[None, :, None, None] + tl.arange(0, BITS // LOW)[None, None, None, :] * LOW
    o_in = b_bit * LANES + tl.arange(0, LANES)[:, None, None, None]
    b_block = (first // BLOCK).to(tl.int64) + o_b
    return b_block, b_block * BLOCK + o_in, (o_in >= begin) & (o_in < end), end > 0


# --- bits ------------------------------------------------------------------------------------------------------------


@triton.jit
def store_bits(p_bits, m_bits, block, numel, LOW: tl.constexpr, BLOCKS: tl.constexpr):
    """One bit an element of a tile [LANES, LOW, BLOCKS, BITS // LOW]."""
    b_bits = m_bits.to(tl.int32) << (tl.arange(0, BITS // LOW) * LOW)[None, None, None, :]
    b_words = tl.sum(tl.sum(b_bits, axis=3) << tl.arange(0, LOW)[None, :, None], axis=1)  # [LANES, BLOCKS]
    o_block = block + tl.arange(0, BLOCKS)[None, :]
    tl.store(p_bits + o_block * LANES + tl.arange(0, LANES)[:, None], b_words, mask=o_block * BLOCK < numel)


@triton.jit
def load_bits(p_bits, o_x, m_x):
    """The bits of elements anywhere: neighbours read the same words, as wide as their own loads."""
    o_x = o_x.to(tl.uint64)  # whose quotients and remainders by powers of two are bits of it
    b_words = tl.load(p_bits + (o_x // BLOCK) * LANES + o_x % LANES, mask=m_x, other=0)
    return ((b_words >> ((o_x // LANES) % BITS).to(tl.int32)) & 1) != 0


@triton.jit
def load_words(p_bits, b_block, m_block, LOW: tl.constexpr, HALF: tl.constexpr):
    """The bits of a plane tile: one load of words for all rows that a thread has of a block.

    HALF: of elements of two bytes, whose loads hold eight, and of words only four. Those loads are of the tile's own
    shape, which gives them its layout.
    """
    b_bit = tl.arange(0, LOW)[None, :, None, None] + tl.arange(0, BITS // LOW)[None, None, None, :] * LOW
    o_same = b_bit * 0 if HALF else tl.arange(0, LOW)[None, :, None, None] * 0
    o_word = b_block * LANES + tl.arange(0, LANES)[:, None, None, None] + o_same
    b_words = tl.load(p_bits + o_word, mask=m_block, other=0)
    return ((b_words >> b_bit) & 1) != 0
