"""Files that attack their reader, or are merely broken: made here, byte by byte, each with what its refusal says.

Gadgets, where they would run, create the file that ``{canary}`` names.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Builder = Callable[[str], bytes]  # path of the canary -> the file


class Case(NamedTuple):
    build: Builder
    says: str  # part of the message


def pt(body: bytes, storages: dict[str, bytes] | None = None, **more: bytes) -> bytes:
    """A zip as torch.save lays it out, around a pickle of our own."""
    members = {"data.pkl": body, "byteorder": b"little", "version": b"3\n", **more}
    members |= {f"data/{key}": data for key, data in (storages or {}).items()}
    return zipped({f"archive/{name}": data for name, data in members.items()})


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name) if method == 0 else name, data)
    return out.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(path: str) -> bytes:
    module, _, last = path.rpartition(".")
    return b"c" + f"{module}\n{last}\n".encode()


PROTO = b"\x80\x02"
FLOATS = name("torch.FloatStorage")


def storage(key: str = "0", count: int = 4, kind: bytes = FLOATS) -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + b"J" + struct.pack("<i", count) + b"tQ"


def integer(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + data


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, store: bytes = b"") -> bytes:
    pair = b"".join(b"(" + b"".join(map(integer, part)) + b"t" for part in (size, stride))
    rebuild = name("torch._utils._rebuild_tensor_v2")
    return rebuild + b"(" + (store or storage()) + integer(offset) + pair + b"\x89" + b"}" + b"tR"


def saved(value: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A dict {"w": value} in a torch file."""
    return pt(PROTO + b"}" + text("w") + value + b"s.", storages or {"0": bytes(16)})


def call(path: str, argument: str = "{canary}", opcode: bytes = b"R") -> Builder:
    """GLOBAL, an argument, and an opcode that calls."""
    return lambda canary: saved(name(path) + b"(" + text(argument.format(canary=canary)) + b"t" + opcode)


TOUCH = text("a program")  # becomes one that creates the canary


def sung(body: bytes, canary: str) -> bytes:
    return body.replace(TOUCH, text(f"import os; open({canary!r}, 'w')"))


def opcode(body: bytes) -> Builder:
    return lambda canary: pt(PROTO + sung(body, canary))


def array(shape: bytes, data: bytes, dtype: bytes = b"") -> bytes:
    kind = dtype or name("numpy.dtype") + b"(" + text("i8") + b"\x89\x88tR"
    start = name("numpy.core.multiarray._reconstruct") + b"(" + name("numpy.ndarray") + b"(K\x00t" + b"C\x01b" + b"tR"
    return start + b"(K\x01" + shape + kind + b"\x89" + b"B" + struct.pack("<I", len(data)) + data + b"tb"


def picture(mode: str, width: int, height: int, data: bytes) -> bytes:
    state = b"(}" + text(mode) + b"(" + integer(width) + integer(height) + b"tNB" + struct.pack("<I", len(data)) + data
    return name("PIL.Image.Image") + b")\x81" + state + b"lb"


def edited(change: Callable[[bytearray], Any]) -> Builder:
    """A sound file, changed."""

    def build(canary: str) -> bytes:
        data = bytearray(saved(tensor((4,), (1,))))
        return bytes(change(data) or data)

    return build


def central(data: bytes) -> int:
    """Place of the first entry of the zip's directory."""
    return data.index(b"PK\x01\x02")


def patch(offset: int, value: bytes) -> Builder:
    """Overwrite bytes of the first directory entry."""

    def change(data: bytearray) -> None:
        start = central(data) + offset
        data[start : start + len(value)] = value

    return edited(change)


def zip64(count: int, start: int, at: int | None = None) -> Callable[[bytearray], bytes]:
    """A zip64 end record and its locator in front of the end record."""

    def change(data: bytearray) -> bytes:
        body, end = bytes(data[:-22]), bytes(data[-22:])
        record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, start, 0)
        return body + record + b"PK\x06\x07" + struct.pack("<IQI", 0, len(body) if at is None else at, 1) + end

    return change


class Gadget:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def gadget(protocol: int, *path: str) -> Builder:
    """What an attacker would really send: pickle's own output, calling Path(canary).touch() or the like."""
    return lambda canary: pt(pickle.dumps({"model": Gadget(Path.touch, Path(canary))}, protocol=protocol))


def legacy(*pickles: bytes, tail: bytes = b"") -> Builder:
    return lambda canary: sung(b"".join(pickles), canary) + tail


MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
HEAD = (MAGIC, pickle.dumps(1001, protocol=2), pickle.dumps({"little_endian": True}, protocol=2))
LAUGHS = b"".join(b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(20))
INTS = storage(kind=name("torch.IntStorage"))
RUNS = "may run code"
CALLS = "calls what it names"

CASES: dict[str, Case] = {
    # --- code: every way in which a pickle calls something ------------------------------------------------------------
    "global os.system": Case(call("posix.system", "touch {canary}"), RUNS),
    "global eval": Case(call("builtins.eval", "open('{canary}', 'w')"), RUNS),
    "global exec of python 2": Case(call("__builtin__.eval", "open('{canary}', 'w')"), RUNS),
    "global open": Case(lambda c: saved(name("io.open") + b"(" + text(c) + text("w") + b"tR"), RUNS),
    "global that is never called": Case(opcode(name("os.getcwd") + b"."), RUNS),
    "global of a submodule": Case(opcode(b"ctorch\n_utils._rebuild_tensor_v2\n."), RUNS),
    "global with an attribute path": Case(opcode(b"ccollections\nOrderedDict.fromkeys\n."), RUNS),
    "global in a bait module": Case(opcode(name("numpy.core.multiarray_.scalar") + b"."), RUNS),
    "global of an endless name": Case(opcode(b"c" + b"a" * 5000), "a name of less than"),
    "global that is no text": Case(opcode(b"c\xff\xfe\nx\n."), "text in UTF-8"),
    "nested torch.load": Case(call("torch.storage._load_from_bytes"), RUNS),
    "torch jit": Case(call("torch.jit.load"), RUNS),
    "numpy pickle loader": Case(call("numpy.load"), RUNS),
    "stack global": Case(opcode(text("posix") + text("system") + b"\x93(" + TOUCH + b"tR."), RUNS),
    "stack global of no names": Case(opcode(b"K\x01K\x02\x93."), "two names"),
    "reduce of a string": Case(opcode(text("system") + b"(" + TOUCH + b"tR."), "a call of something listed"),
    "reduce of a class": Case(opcode(name("numpy.ndarray") + b"(K\x01tR."), "a call of something listed"),
    "reduce without a tuple": Case(opcode(name("numpy.dtype") + text("i8") + b"R."), "a call of something listed"),
    "build on a list": Case(opcode(b"]}" + text("__setstate__") + TOUCH + b"sb."), "a state for"),
    "build on a dtype twice": Case(opcode(b"}" + text("a") + text("b") + b"s}b."), "a state for"),
    "inst": Case(opcode(b"(" + TOUCH + b"ios\nsystem\n."), CALLS),
    "obj": Case(opcode(b"(" + name("builtins.eval") + TOUCH + b"o."), RUNS),
    "obj of something listed": Case(opcode(b"(" + name("numpy.dtype") + TOUCH + b"o."), CALLS),
    "newobj": Case(opcode(name("numpy.dtype") + b"(" + text("i8") + b"t\x81."), "a new object of"),
    "newobj of a foreign class": Case(opcode(name("subprocess.Popen") + b"(" + TOUCH + b"t\x81."), RUNS),
    "newobj_ex": Case(opcode(name("numpy.dtype") + b")}\x92."), CALLS),
    "ext1": Case(opcode(b"\x82\x01."), CALLS),
    "ext2": Case(opcode(b"\x83\x01\x00."), CALLS),
    "ext4": Case(opcode(b"\x84\x01\x00\x00\x00."), CALLS),
    "persid": Case(opcode(b"Pstorage\n."), CALLS),
    "pickle's own, protocol 2": Case(gadget(2), RUNS),
    "pickle's own, protocol 4": Case(gadget(4), RUNS),
    "torchscript": Case(lambda c: pt(PROTO + b"}.", **{"constants.pkl": b"", "code/x.py": b""}), "TorchScript"),
    "legacy gadget in the first pickle": Case(legacy(PROTO + name("posix.system") + b"(" + TOUCH + b"tR."), RUNS),
    "legacy gadget in the value": Case(legacy(*HEAD, PROTO + name("os.mkdir") + b"(" + TOUCH + b"tR."), RUNS),
    "legacy gadget in the keys": Case(legacy(*HEAD, PROTO + b"}.", PROTO + name("os.mkdir") + b"."), RUNS),
    # --- the pickle machine -------------------------------------------------------------------------------------------
    "persistent id of text": Case(opcode(text("storage") + b"Q."), "the identity of a storage"),
    "persistent id of a class": Case(opcode(b"(" + text("module") + b"NNNNtQ."), "the identity of a storage"),
    "storage of a foreign class": Case(opcode(storage(kind=name("numpy.ndarray")) + b"."), "class, key and count"),
    "memo of nothing": Case(opcode(b"h\x07."), "a value in the memo"),
    "memo of an empty stack": Case(opcode(b"q\x00."), "a value on the stack"),
    "list inside itself": Case(opcode(b"]q\x00h\x00a."), "a value inside itself"),
    "dict inside itself": Case(opcode(b"}q\x00" + text("a") + b"h\x00s."), "a value inside itself"),
    "billion laughs": Case(opcode(b"]q\x00" + LAUGHS + b"."), "more, or a value inside itself"),
    "deep nesting": Case(opcode(b"]" * 200_000 + b"a" * 199_999 + b"."), "deep"),
    "deep tuples": Case(opcode(b")" + b"\x85" * 500_000 + b"."), "deep"),
    "flood of marks": Case(opcode(b"(" * 1_000_000 + b"."), "marks"),
    "open mark at the end": Case(opcode(b"N(."), "a closed mark"),
    "pop below a mark": Case(opcode(b"N(a."), "a value on the stack"),
    "stop on an empty stack": Case(opcode(b"."), "a value on the stack"),
    "no stop": Case(opcode(b"N"), "more bytes"),
    "second pickle behind the first": Case(opcode(b"N.N."), "one pickle"),
    "huge long4": Case(opcode(b"\x8b\xff\xff\xff\x7f."), "an integer of at most"),
    "huge long1": Case(opcode(b"\x8a\x0c" + b"\x7f" * 12 + b"."), "integers of 64 bits"),
    "huge unicode": Case(opcode(b"X\xff\xff\xff\xffabc."), "more bytes"),
    "huge unicode8": Case(opcode(b"\x8d" + b"\xff" * 8 + b"."), "more bytes"),
    "huge bytes8": Case(opcode(b"\x8e" + b"\xff" * 7 + b"\x7f."), "more bytes"),
    "huge bytearray8": Case(opcode(b"\x96" + b"\xff" * 7 + b"\x7f."), "more bytes"),
    "huge frame": Case(opcode(b"\x95" + b"\xff" * 7 + b"\x7fN."), "a frame of at most"),
    "protocol 99": Case(lambda c: pt(b"\x80\x63N."), "pickle protocol 2 to 5"),
    "protocol 0": Case(lambda c: pt(b"I1\n."), "what plain values are written with"),
    "unknown opcode": Case(opcode(b"\xff."), "an opcode of pickle"),
    "text that is no utf-8": Case(opcode(b"X\x02\x00\x00\x00\xff\xff."), "text in UTF-8"),
    "duplicate keys": Case(opcode(b"}" + (text("model") + b"Ns") * 2 + b"."), "every key once"),
    "a list as key": Case(opcode(b"}]Ns."), "text or an integer as a key"),
    "true as key": Case(opcode(b"}\x88Ns."), "text or an integer as a key"),
    "items for a tuple": Case(opcode(b")" + text("a") + b"Ns."), "a mapping and pairs"),
    "out-of-band buffer": Case(opcode(b"\x97."), "what plain values are written with"),
    # --- arrays, tensors, images --------------------------------------------------------------------------------------
    "array of objects": Case(lambda c: saved(name("numpy.dtype") + b"(" + text("O8") + b"\x89\x88tR"), "numpy dtype"),
    "array shorter than its shape": Case(lambda c: saved(array(b"(K\x09t", bytes(8))), "72 bytes for an array"),
    "array of a huge shape": Case(lambda c: saved(array(b"(" + integer(2**62) * 2 + b"t", b"")), "bytes for an array"),
    "array of a negative shape": Case(lambda c: saved(array(b"(" + integer(-1) + b"t", b"")), "the arguments"),
    "array without a state": Case(
        lambda c: saved(name("numpy._core.multiarray._reconstruct") + b"(" + name("numpy.ndarray") + b")NtR"), "a whole"
    ),
    "tensor beyond its storage": Case(lambda c: saved(tensor((5,), (1,))), "a tensor inside its storage"),
    "tensor with a large offset": Case(lambda c: saved(tensor((2,), (1,), 3)), "a tensor inside its storage"),
    "tensor with a negative offset": Case(lambda c: saved(tensor((2,), (1,), -1)), "the arguments"),
    "tensor with a negative stride": Case(lambda c: saved(tensor((2,), (-1,), 1)), "the arguments"),
    "tensor expanded to petabytes": Case(lambda c: saved(tensor((2**40,), (0,))), "a tensor inside its storage"),
    "tensor whose size overflows": Case(lambda c: saved(tensor((2**33, 2**33), (0, 0))), "a tensor inside its storage"),
    "tensor of many dimensions": Case(lambda c: saved(tensor((1,) * 9, (1,) * 9)), "the arguments"),
    "tensor with too few strides": Case(lambda c: saved(tensor((2, 2), (1,))), "the arguments"),
    "tensor without a storage": Case(lambda c: saved(tensor((1,), (1,), store=b"N")), "the arguments"),
    "one storage, two dtypes": Case(
        lambda c: saved(b"](" + tensor((4,), (1,)) + tensor((4,), (1,), store=INTS) + b"e"), "a storage of float32"
    ),
    "storage larger than its member": Case(
        lambda c: saved(tensor((4,), (1,), store=storage(count=2**30))), "4294967296 bytes, as declared"
    ),
    "storage without a member": Case(lambda c: saved(tensor((4,), (1,), store=storage("7"))), "no such member"),
    "storage key that climbs": Case(lambda c: saved(tensor((4,), (1,), store=storage("../../x"))), "no such member"),
    "image of a huge side": Case(lambda c: saved(picture("L", 2**40, 1, b"")), "sides of 1 to"),
    "image without pixels": Case(lambda c: saved(picture("RGB", 4, 4, b"abc")), "the arguments"),
    "image of a strange mode": Case(lambda c: saved(picture("I;16", 1, 1, b"ab")), "a mode among"),
    "array of no numbers and huge sides": Case(
        lambda c: saved(array(b"(K\x00" + integer(2**62) * 2 + b"t", b"")), "sides of at most"
    ),
    "tensor of no numbers and huge sides": Case(lambda c: saved(tensor((0, 2**62), (1, 1))), "sides and strides"),
    "tensor of one number and a huge stride": Case(lambda c: saved(tensor((1,), (2**62,))), "sides and strides"),
    "tensor whose strides overflow": Case(lambda c: saved(tensor((2, 2), (2**62, 2**62))), "sides and strides"),
    "array of records": Case(lambda c: saved(name("numpy.dtype") + b"(" + text("V8") + b"\x89\x88tR"), "numpy dtype"),
    "array of nothing": Case(lambda c: saved(name("numpy.dtype") + b"(" + text("") + b"\x89\x88tR"), "numpy dtype"),
    "scalar shorter than its dtype": Case(
        lambda c: saved(
            name("numpy._core.multiarray.scalar") + b"(" + name("numpy.dtype") + b"(" + text("i8") + b"\x89\x88tR"
            b"C\x04abcdtR"
        ),
        "the arguments",
    ),
    "parameter of nothing": Case(lambda c: saved(name("torch._utils._rebuild_parameter") + b"(N\x88}tR"), "arguments"),
    "size of truth values": Case(lambda c: saved(name("torch.Size") + b"((\x88\x89ttR"), "the arguments"),
    "storage as a value": Case(lambda c: saved(storage()), "a plain value"),
    "class as a value": Case(lambda c: saved(name("numpy.ndarray")), "a plain value"),
    "storage of True numbers": Case(
        lambda c: saved(b"(" + text("storage") + FLOATS + text("0") + text("cpu") + b"\x88tQ"), "class, key and count"
    ),
    "storage of another view": Case(
        lambda c: saved(b"(" + text("storage") + FLOATS + text("0") + text("cpu") + b"K\x04(K\x00K\x01ttQ"),
        "whole storages",
    ),
    "storage named by a number": Case(
        lambda c: saved(b"(" + text("storage") + FLOATS + b"K\x00" + text("cpu") + b"K\x04tQ"), "class, key and count"
    ),
    "image without a state": Case(lambda c: saved(name("PIL.Image.Image") + b")\x81"), "a plain value"),
    "image without a side": Case(lambda c: saved(picture("L", 0, 1, b"")), "sides of 1 to"),
    "image with a palette": Case(lambda c: saved(picture("P", 1, 1, b"a")), "a mode among"),
    "a number with a point as key": Case(opcode(b"}G" + bytes(8) + b"Ns."), "text or an integer as a key"),
    "half a character": Case(opcode(b"X\x03\x00\x00\x00\xed\xa0\x80."), "half a character"),
    "text named a thousand times": Case(
        opcode(b"](" + text("a" * (1 << 20)) + b"q\x00" + b"h\x00" * 1000 + b"e."), "letters"
    ),
    # --- the zip ------------------------------------------------------------------------------------------------------
    "empty file": Case(lambda c: b"", "1 to"),
    "no file of torch": Case(lambda c: b"GIF89a" + bytes(64), "a file of torch.save"),
    "plain pickle": Case(lambda c: pickle.dumps({"data": 1}, protocol=2), "a pickle of something else"),
    "truncated": Case(edited(lambda data: data[: len(data) // 2]), "cut off"),
    "bytes behind the end": Case(edited(lambda data: data + b"more"), "something lies behind"),
    "bytes before the start": Case(edited(lambda data: b"PK\x03\x04" + data), "directory right before"),
    "compressed bomb": Case(
        lambda c: zipped({"archive/data.pkl": bytes(1 << 24)}, zipfile.ZIP_DEFLATED), "a compressed one"
    ),
    "encrypted": Case(patch(8, b"\x01\x00"), "an encrypted one"),
    "duplicate names": Case(
        lambda c: pt(PROTO + b"N.", **{"datb.pkl": b"N."}).replace(b"datb", b"data"), "every name once"
    ),
    "name that climbs": Case(lambda c: zipped({"archive/../../x": b"", "archive/data.pkl": b"N."}), "a plain name"),
    "absolute name": Case(lambda c: zipped({"/etc/x": b"", "archive/data.pkl": b"N."}), "a plain name"),
    "two folders": Case(lambda c: zipped({"a/data.pkl": b"N.", "b/data.pkl": b"N."}), "one folder"),
    "no pickle": Case(lambda c: zipped({"archive/version": b"3"}), "no such member"),
    "names that disagree": Case(edited(lambda data: data.replace(b"archive/data.pkl", b"archive/dota.pkl", 1)), "name"),
    "size beyond the directory": Case(patch(20, b"\xff\xff\xff\x7f\xff\xff\xff\x7f"), "bytes before the directory"),
    "stored and declared sizes differ": Case(patch(24, b"\xff\xff\xff\x00"), "as many bytes stored"),
    "zip64 sizes without a field": Case(patch(20, b"\xff" * 8), "a zip64 field"),
    "header elsewhere": Case(patch(42, b"\x05\x00\x00\x00"), "its header at"),
    "overlapping members": Case(patch(20, struct.pack("<II", 300, 300)), "that do not overlap"),
    "more members than there are": Case(edited(lambda data: data[:-14] + b"\x50\x00\x50\x00" + data[-10:]), "an entry"),
    "big-endian": Case(lambda c: pt(PROTO + b"N.", byteorder=b"big"), "little-endian"),
    "zip in a zip": Case(lambda c: pt(pt(PROTO + b"N.")), CALLS),
    "zip64 end record that disagrees": Case(edited(zip64(2**63, 2**40)), "as the end record says"),
    "zip64 end record far away": Case(edited(zip64(3, 0, at=2**40)), "right before its locator"),
    "a letter that looks like another": Case(
        lambda c: zipped({"archive/data.pkl": b"N.", "archive/d\u0430ta/0": b""}), "a plain name"
    ),
    "empty name": Case(lambda c: zipped({"archive/data.pkl": b"N.", "archive//x": b""}), "a plain name"),
    # --- the legacy format --------------------------------------------------------------------------------------------
    "legacy of another version": Case(legacy(MAGIC, pickle.dumps(7, protocol=2), HEAD[2], HEAD[2], HEAD[2]), "legacy"),
    "legacy big-endian": Case(
        legacy(MAGIC, HEAD[1], pickle.dumps({"little_endian": False}, protocol=2), HEAD[2], HEAD[2]), "little-endian"
    ),
    "legacy storage cut off": Case(
        legacy(*HEAD, PROTO + storage() + b".", pickle.dumps(["0"], protocol=2), tail=struct.pack("<q", 4) + b"ab"),
        "4 numbers, as declared",
    ),
    "legacy storage of another size": Case(
        legacy(*HEAD, PROTO + storage() + b".", pickle.dumps(["0"], protocol=2), tail=struct.pack("<q", 2**60)),
        "4 numbers, as declared",
    ),
    "legacy keys that are not there": Case(legacy(*HEAD, PROTO + b"N.", pickle.dumps(["0"], protocol=2)), "keys of"),
    "legacy bytes behind the end": Case(legacy(*HEAD, PROTO + b"N.", PROTO + b"].", tail=b"more"), "nothing behind"),
}
