"""The parts of a file of ``torch.save``: a zip archive since torch 1.6, before that a run of pickles and raw storages.

And a file of ``pickle.dump``: one pickle, and nothing behind it.

The zip is read by the strict few lines below and not by a library: readers differ in what they make of duplicate names,
overlapping members or bytes behind the end, and a file that two readers understand differently can hide anything.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from .inert import TORCH_DTYPES, Name, Storage, whole
from .opcodes import Machine
from .refused import Refused, damaged, quote

MAX_MEMBERS = 100_000
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

_END = b"PK\x05\x06"
_END64 = b"PK\x06\x06"
_LOCATOR64 = b"PK\x06\x07"
_CENTRAL = b"PK\x01\x02"
_LOCAL = b"PK\x03\x04"
_PROTOCOLS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_NAME = re.compile(r"[ -.0-\[\]-~]+(/[\w.+\-]+)+\Z", re.ASCII)  # the folder is called as the file was: a=1, b (2)


class Contents:
    """What a file holds, not yet checked against each other.

    Attributes:
        kind: "zip", "legacy" or "pickle".
        value: what was saved, of plain values and :mod:`.inert` objects.
        storages: key -> (first byte, number of bytes) in the file.
    """

    def __init__(self, kind: str, value: Any, storages: dict[str, tuple[int, int]]) -> None:
        self.kind, self.value, self.storages = kind, value, storages


def read(data: Any, max_pickle: int) -> Contents:
    """Read a file of torch.save that lies in ``data`` (bytes or a map of a file)."""
    if data[:4] == _LOCAL:
        return _read_zip(data, max_pickle)
    if data[:2] in _PROTOCOLS:
        return _read_legacy(data, max_pickle)
    raise Refused("unsupported", "first bytes", "a file of torch.save", quote(bytes(data[:8])), "check what it is")


def read_pickle(data: Any, max_pickle: int) -> Contents:
    """Read a file of pickle.dump that lies in ``data``, of Python 2 or 3."""
    if data[:2] not in _PROTOCOLS:
        expected, got = "a pickle of protocol 2 to 5", quote(bytes(data[:8]))
        raise Refused("unsupported", "first bytes", expected, got, "check what it is")
    _check_pickle(len(data), max_pickle, "the file")
    machine = Machine(data, 0, len(data), "the pickle", python2=True)
    value = machine.run()
    if machine.at != len(data):
        raise damaged("end of the file", "one pickle", f"{len(data) - machine.at} bytes behind it")
    return Contents("pickle", value, {})


# --- zip ------------------------------------------------------------------------------------------------------------


def _read_zip(data: Any, max_pickle: int) -> Contents:
    members = members_of(data)
    tops = {name.partition("/")[0] for name in members}
    if len(tops) != 1:
        raise damaged("zip directory", "one folder", f"{len(tops)}")
    (top,) = tops
    inside = {name.partition("/")[2]: where for name, where in members.items()}
    if program := next((name for name in inside if name == "constants.pkl" or name.startswith("code/")), None):
        remedy = "save model.state_dict() instead"
        raise Refused("code", program, "plain values", "a TorchScript archive, which holds a program", remedy)
    if "data.pkl" not in inside:
        raise damaged(f"{top}/data.pkl", "the pickle of torch.save", "no such member")
    if "byteorder" in inside and _slice(data, inside["byteorder"], 16) != b"little":
        raise Refused(
            "unsupported", "byteorder", "little-endian numbers", "others", "save it on a little-endian machine"
        )
    storages = {name.removeprefix("data/"): where for name, where in inside.items() if name.startswith("data/")}
    start, size = inside["data.pkl"]
    _check_pickle(size, max_pickle)
    machine = Machine(data, start, start + size, "data.pkl", _ZipStorages(storages))
    value = machine.run()
    if machine.at != start + size:
        raise damaged("data.pkl", "one pickle", f"{start + size - machine.at} bytes behind it")
    return Contents("zip", value, storages)


class _ZipStorages:
    """Persistent ids of a zip file: ``("storage", class, key, place, count)``."""

    def __init__(self, storages: dict[str, tuple[int, int]]) -> None:
        self.storages = storages

    def __call__(self, identity: Any, where: str) -> Storage:
        storage = _storage(identity, where)
        if storage.key not in self.storages:
            raise damaged(f"data/{storage.key}", "the numbers of a tensor", "no such member")
        held = self.storages[storage.key][1]
        if held != storage.count * storage.itemsize:
            raise damaged(f"data/{storage.key}", f"{storage.count * storage.itemsize} bytes, as declared", f"{held}")
        return storage


def _storage(identity: Any, where: str) -> Storage:
    if not isinstance(identity, tuple) or not 5 <= len(identity) <= 6 or identity[0] != "storage":
        raise damaged(where, "the identity of a storage", quote(identity))
    kind, key, count = identity[1], identity[2], identity[4]
    known = isinstance(kind, Name) and kind.path.removeprefix("torch.") in TORCH_DTYPES
    if not known or not isinstance(key, str) or len(key) > 64 or not whole(count):
        raise damaged(where, "a storage with class, key and count", f"{quote(kind)}, {quote(key)}, {quote(count)}")
    if len(identity) == 6 and identity[5] is not None:
        raise Refused("unsupported", where, "whole storages", "a view of one", "save it with a newer torch")
    return Storage(*TORCH_DTYPES[kind.path.removeprefix("torch.")], key, count)


def members_of(data: Any) -> dict[str, tuple[int, int]]:
    """Name -> (first byte, number of bytes) of every member."""
    start, size, count = _directory(data)
    if not 1 <= count <= MAX_MEMBERS:
        raise Refused("limit", "zip directory", f"1 to {MAX_MEMBERS} members", str(count), "save fewer tensors")
    spans: list[tuple[int, int, str]] = []
    members: dict[str, tuple[int, int]] = {}
    at, stop = start, start + size
    for number in range(count):
        name, header, length, at = _entry(data, at, stop, number)
        if name in members:
            raise damaged("zip directory", "every name once", f"{quote(name)} twice")
        first = _local(data, header, name)
        if first + length > start:
            raise damaged(name, "bytes before the directory", f"{length} at {first}")
        members[name] = (first, length)
        spans.append((header, first + length, name))
    if at != stop:
        raise damaged("zip directory", f"{count} members", f"{stop - at} bytes more")
    spans.sort()
    if spans[0][0] != 0:
        raise damaged(spans[0][2], "the first member at the start of the file", f"it at {spans[0][0]}")
    for (_, end, _), (begin, _, name) in pairwise(spans):
        if begin < end:
            raise damaged(name, "members that do not overlap", f"one at {begin}, before {end}")
    return members


def _directory(data: Any) -> tuple[int, int, int]:
    """(first byte, bytes, members) of the central directory, from the record that ends the file."""
    end = len(data) - 22
    if end < 0 or data[end : end + 4] != _END or _u(data, end + 20, 2):
        got = "other bytes: the file is cut off, or something lies behind it"
        raise damaged("zip directory", "its end record at the end of the file", got)
    disks, counts = (_u(data, end + 4, 2), _u(data, end + 6, 2)), (_u(data, end + 8, 2), _u(data, end + 10, 2))
    size, start = _u(data, end + 12, 4), _u(data, end + 16, 4)
    stop = end
    if end >= 20 and data[end - 20 : end - 16] == _LOCATOR64:
        stop = _u(data, end - 12, 8)
        if stop + 56 != end - 20 or data[stop : stop + 4] != _END64:
            raise damaged("zip64 end record", "it right before its locator", "other bytes")
        narrow = counts[0], size, start
        disks = _u(data, stop + 16, 4), _u(data, stop + 20, 4)
        counts = _u(data, stop + 24, 8), _u(data, stop + 32, 8)
        size, start = _u(data, stop + 40, 8), _u(data, stop + 48, 8)
        for short, exact in zip(narrow, (counts[0], size, start), strict=True):
            if short not in (exact, 0xFFFF, 0xFFFFFFFF):
                raise damaged("zip64 end record", f"{short}, as the end record says", str(exact))
    if any(disks) or counts[0] != counts[1] or start + size != stop:
        raise damaged("zip directory", "one directory right before its end record", f"{size} bytes at {start}")
    return start, size, counts[0]


def _entry(data: Any, at: int, stop: int, number: int) -> tuple[str, int, int, int]:
    """(name, place of the local header, bytes, place of the next entry) of one directory entry."""
    where = f"zip directory, member {number}"
    if at + 46 > stop or data[at : at + 4] != _CENTRAL:
        raise damaged(where, "an entry", "other bytes")
    flags, method = _u(data, at + 8, 2), _u(data, at + 10, 2)
    packed, size, header = _u(data, at + 20, 4), _u(data, at + 24, 4), _u(data, at + 42, 4)
    lengths = _u(data, at + 28, 2), _u(data, at + 30, 2), _u(data, at + 32, 2)
    after = at + 46 + sum(lengths)
    if after > stop:
        raise damaged(where, "an entry inside the directory", f"{sum(lengths)} bytes of names")
    name = _name(data, at + 46, lengths[0], where)
    if flags & 1:
        raise Refused("unsupported", name, "a plain member", "an encrypted one", "save it with torch.save")
    if method:
        raise Refused("unsupported", name, "a stored member", "a compressed one", "save it with torch.save")
    size, packed, header = _wide(data, at + 46 + lengths[0], lengths[1], (size, packed, header), name)
    if size != packed:
        raise damaged(name, "as many bytes stored as declared", f"{packed} for {size}")
    return name, header, size, after


def _wide(data: Any, at: int, length: int, values: tuple[int, int, int], name: str) -> tuple[int, int, int]:
    """``values`` with those that do not fit 32 bits taken from the zip64 field."""
    wanted = sum(value == 0xFFFFFFFF for value in values)
    stop = at + length
    while wanted and at + 4 <= stop:
        tag, size = _u(data, at, 2), _u(data, at + 2, 2)
        if tag == 1 and at + 4 + size <= stop and size >= 8 * wanted:
            wide = iter([_u(data, at + 4 + 8 * i, 8) for i in range(wanted)])
            a, b, c = (next(wide) if value == 0xFFFFFFFF else value for value in values)
            return a, b, c
        at += 4 + size
    if wanted:
        raise damaged(name, "a zip64 field", "none that is long enough")
    return values


def _local(data: Any, header: int, name: str) -> int:
    """First byte of a member's data."""
    if header + 30 > len(data) or data[header : header + 4] != _LOCAL:
        raise damaged(name, f"its header at {header}", "other bytes")
    length, extra = _u(data, header + 26, 2), _u(data, header + 28, 2)
    if _name(data, header + 30, length, name) != name:
        raise damaged(name, "the same name in header and directory", "another one")
    return header + 30 + length + extra


def _name(data: Any, at: int, length: int, where: str) -> str:
    raw = bytes(data[at : at + length])
    name = raw.decode("utf-8", "replace")
    if not _NAME.match(name) or any(part in (".", "..") for part in name.split("/")):
        raise damaged(where, "a plain name inside one folder", quote(name))
    return name


def _u(data: Any, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "little")


def _slice(data: Any, where: tuple[int, int], limit: int) -> bytes:
    return bytes(data[where[0] : where[0] + min(where[1], limit)])


def _check_pickle(size: int, limit: int, part: str = "data.pkl") -> None:
    if size > limit:
        raise Refused("limit", part, f"at most {limit} bytes", str(size), "raise the limit if you know the file")


# --- legacy ---------------------------------------------------------------------------------------------------------


def _read_legacy(data: Any, max_pickle: int) -> Contents:
    """Five pickles (magic, protocol, system, value, keys), then every storage behind its count."""
    found: dict[str, Storage] = {}

    def remember(identity: Any, where: str) -> Storage:
        storage = _storage(identity, where)
        known = found.setdefault(storage.key, storage)
        if (known.dtype, known.count) != (storage.dtype, storage.count):
            raise damaged(where, "one declaration a storage", f"two of {quote(storage.key)}")
        return storage

    at = 0
    parts: list[Any] = []
    for part in ("magic number", "protocol", "system", "pickle", "storage keys"):
        machine = Machine(data, at, min(len(data), at + max_pickle), part, remember if part == "pickle" else None)
        parts.append(machine.run())
        at = machine.at
        if part == "magic number" and parts[0] != LEGACY_MAGIC:
            remedy = "read it with the program that wrote it, if you trust it"
            raise Refused("unsupported", part, "a file of torch.save", "a pickle of something else", remedy)
    if parts[1] != LEGACY_PROTOCOL or not isinstance(parts[2], dict) or parts[2].get("little_endian") is not True:
        raise damaged("protocol", "the legacy format, little-endian", "another")
    keys = parts[4]
    if not isinstance(keys, list) or len(keys) != len(found) or any(type(key) is not str for key in keys):
        raise damaged("storage keys", f"the {len(found)} keys of the tensors", "others")
    storages: dict[str, tuple[int, int]] = {}
    for key in keys:
        if key not in found or key in storages:
            raise damaged("storage keys", "every key of a tensor once", quote(key))
        storage, count = found[key], _u(data, at, 8)
        size = storage.count * storage.itemsize
        if count != storage.count or at + 8 + size > len(data):
            raise damaged(f"storage {key}", f"{storage.count} numbers, as declared", f"{count}, or the end of the file")
        storages[key] = (at + 8, size)
        at += 8 + size
    if at != len(data):
        raise damaged("end of the file", "nothing behind the last storage", f"{len(data) - at} bytes")
    return Contents("legacy", parts[3], storages)
