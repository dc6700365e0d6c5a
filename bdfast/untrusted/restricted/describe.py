"""What was read, as JSON and raw bytes: nothing in either can do anything.

Plain values stand for themselves; everything else is a list that opens with its kind::

    ["dict", [key, value], ...]   ["list", ...]   ["tuple", ...]   ["float", "nan"]
    ["bytes", first, count]       ["image", mode, width, height, first, count]
    ["array", code, shape, fortran, first, count]   ["tensor", storage, offset, size, stride]

``first`` and ``count`` are bytes of the blob, ``storage`` a key of the table of storages.
"""

from __future__ import annotations

import math
from typing import IO, Any

from .container import Contents
from .inert import NUMPY_DTYPES, Array, Dtype, Image, Tensor
from .refused import Refused, damaged, quote

MAX_DEPTH = 32
MAX_SIDE = 1 << 40  # of an array or a tensor
MAX_TEXT = 1 << 26  # letters, shared texts counted wherever they occur
_CHUNK = 1 << 24
_ALIGN = 64


class Describer:
    """Turns :class:`Contents` into a description, and copies raw bytes to a blob as it meets them.

    Args:
        data: the file.
        contents: what was found in it.
        blob: where raw bytes go.
        max_bytes: the most of them.
        max_values: the most values of all kinds, shared ones counted wherever they occur.
    """

    def __init__(self, data: Any, contents: Contents, blob: IO[bytes], max_bytes: int, max_values: int) -> None:
        self.data, self.contents, self.blob = data, contents, blob
        self.max_bytes, self.max_values = max_bytes, max_values
        self.storages: dict[str, list[Any]] = {}
        self.written = 0
        self.count = 0
        self.letters = 0
        self.path: list[str] = []
        self.spans: dict[int, tuple[bytes, tuple[int, int]]] = {}  # of bytes by identity; kept, so that none is reused

    def describe(self) -> dict[str, Any]:
        """The whole description."""
        value = self.value(self.contents.value)
        return {"kind": self.contents.kind, "value": value, "storages": self.storages, "blob": self.written}

    @property
    def where(self) -> str:
        return "".join(self.path).lstrip(".") or "the whole value"

    def value(self, value: Any) -> Any:
        self.count += 1
        if self.count > self.max_values or len(self.path) > MAX_DEPTH:
            expected = f"at most {self.max_values} values, {MAX_DEPTH} deep"
            raise Refused("limit", self.where[:200], expected, "more, or a value inside itself", "save less")
        if value is None or isinstance(value, (bool, str)):
            return self.text(value) if isinstance(value, str) else value
        if isinstance(value, int):
            if value.bit_length() > 63:
                raise Refused("limit", self.where, "integers of 64 bits", quote(value), "save smaller numbers")
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else ["float", repr(value)]
        return self.compound(value)

    def compound(self, value: Any) -> list[Any]:
        if isinstance(value, dict):
            return ["dict", *([self.text(key), self.child(f".{key}"[:80], item)] for key, item in value.items())]
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return [kind, *(self.child(f"[{index}]", item) for index, item in enumerate(value))]
        if isinstance(value, bytes):
            return ["bytes", *self.write(value)]
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, Array):
            return self.array(value)
        if isinstance(value, Image) and value.data is not None:
            return ["image", value.mode, *value.size, *self.write(value.data)]
        if isinstance(value, Dtype):
            return ["bytes", *self.write(value.code.encode())]
        got = quote(value)
        raise Refused("unsupported", self.where, "a plain value, an array or a tensor", got, "save plain values")

    def child(self, step: str, item: Any) -> Any:
        self.path.append(step)
        described = self.value(item)
        self.path.pop()
        return described

    def text(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        self.letters += len(value)
        if self.letters > MAX_TEXT:
            raise Refused("limit", self.where, f"at most {MAX_TEXT} letters", "more", "save less text")
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise damaged(self.where, "text in UTF-8", "half a character")
        return value

    def tensor(self, tensor: Tensor) -> list[Any]:
        storage, count = tensor.storage, math.prod(tensor.size)
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride, strict=True))
        if any(side > MAX_SIDE for side in (*tensor.size, *tensor.stride)):
            got = f"{list(tensor.size)} with strides {list(tensor.stride)}"
            raise damaged(self.where, f"sides and strides of at most {MAX_SIDE}", got)
        if count and (count > storage.count or last >= storage.count):
            got = f"{list(tensor.size)} with strides {list(tensor.stride)} from {tensor.offset} of {storage.count}"
            raise damaged(self.where, "a tensor inside its storage", got)
        known = self.storages.get(storage.key)
        if known is None:
            self.storages[storage.key] = [storage.dtype, *self.copy(*self.contents.storages[storage.key])]
        elif known[0] != storage.dtype:
            raise damaged(self.where, f"a storage of {known[0]}, as before", storage.dtype)
        return ["tensor", storage.key, tensor.offset, list(tensor.size), list(tensor.stride)]

    def array(self, array: Array) -> list[Any]:
        if array.dtype is None or array.dtype.code not in NUMPY_DTYPES:
            raise damaged(self.where, "a whole array", "one without a state")
        size = math.prod(array.shape) * array.dtype.size
        if size != len(array.data):
            raise damaged(self.where, f"{size} bytes for an array of {list(array.shape)}", f"{len(array.data)}")
        if any(side > MAX_SIDE for side in array.shape):  # beside a 0, any number passes for the size
            raise damaged(self.where, f"sides of at most {MAX_SIDE}", f"{list(array.shape)}")
        code = array.dtype.order.replace("|", "<") + array.dtype.code
        return ["array", code, list(array.shape), array.fortran, *self.write(array.data)]

    def copy(self, start: int, size: int) -> tuple[int, int]:
        first = self.reserve(size)
        for at in range(start, start + size, _CHUNK):
            self.blob.write(self.data[at : min(at + _CHUNK, start + size)])
        return first, size

    def write(self, data: bytes) -> tuple[int, int]:
        """Once for all that share these very bytes."""
        if id(data) not in self.spans:
            first = self.reserve(len(data))
            self.blob.write(data)
            self.spans[id(data)] = data, (first, len(data))
        return self.spans[id(data)][1]

    def reserve(self, size: int) -> int:
        padding = -self.written % _ALIGN if size >= _ALIGN else -self.written % 8
        if self.written + padding + size > self.max_bytes:
            raise Refused("limit", self.where, f"at most {self.max_bytes} bytes", "more", "raise the limit")
        self.blob.write(b"\0" * padding)
        first = self.written + padding
        self.written = first + size
        return first
