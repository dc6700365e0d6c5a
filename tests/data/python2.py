"""Pickles as Python 2 wrote them: protocol 2 of its cPickle, with byte strings, opcode by opcode."""

from __future__ import annotations

import struct
from itertools import count
from typing import Any

from numpy.typing import NDArray

BATCH = 1000  # items that are appended at once


def dumps(value: object) -> bytes:
    """What ``cPickle.dumps(value, 2)`` gave: every ``str`` is a byte string, every array one of numpy 1."""
    memo = count(1)  # cPickle counts from 1, pickle.py from 0

    def put() -> bytes:
        number = next(memo)
        return b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)

    def text(data: bytes) -> bytes:
        return (b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<I", len(data))) + data

    def integer(number: int) -> bytes:
        if 0 <= number < 1 << 16:
            return b"K" + bytes([number]) if number < 256 else b"M" + struct.pack("<H", number)
        return b"J" + struct.pack("<i", number)

    def array(values: NDArray[Any]) -> bytes:
        name = f"{values.dtype.kind}{values.dtype.itemsize}".encode()
        order = b"|" if values.dtype.itemsize == 1 else b"<"
        fortran = values.flags.f_contiguous and not values.flags.c_contiguous
        made = b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put()
        made += b"K\x00\x85" + text(b"b") + b"\x87R" + put()
        kind = b"cnumpy\ndtype\n" + put() + text(name) + b"K\x00K\x01\x87R" + put()
        kind += b"(K\x03" + text(order) + b"NNN" + integer(-1) * 2 + b"K\x00tb"
        shape = b"".join(map(integer, values.shape)) + {1: b"\x85", 2: b"\x86", 3: b"\x87"}[values.ndim]
        data = text(values.tobytes("F" if fortran else "C"))
        return made + b"(K\x01" + shape + kind + (b"\x88" if fortran else b"\x89") + data + b"tb"

    def save(item: Any) -> bytes:
        if isinstance(item, int):
            return integer(item)
        if isinstance(item, str):
            return text(item.encode("latin-1")) + put()
        if isinstance(item, list):
            parts = [item[at : at + BATCH] for at in range(0, len(item), BATCH)]
            return b"]" + put() + b"".join(b"(" + b"".join(map(save, part)) + b"e" for part in parts)
        if isinstance(item, dict):
            return b"}" + put() + b"(" + b"".join(save(part) for pair in item.items() for part in pair) + b"u"
        return array(item)

    return b"\x80\x02" + save(value) + b"."
