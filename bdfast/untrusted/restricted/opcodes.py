"""The pickle machine, for the opcodes that torch.save and numpy's arrays are written with.

A stack, a memo, marks. Objects are made by :mod:`.inert` alone. Every length is compared with what is left of the file
before it is used; there is no recursion, whatever the file nests.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from .inert import Constructor, find, make, set_state
from .refused import Refused, damaged, quote

MAX_STACK = 1 << 24
MAX_MARKS = 1 << 10  # open containers
MAX_INTEGER_BYTES = 16
MAX_NAME = 256

_TEXT = "IFLSVgp"  # INT FLOAT LONG STRING UNICODE GET PUT: lines of text, which protocol 2 and later never write
_CODE = {
    ord("i"): "INST",
    ord("o"): "OBJ",
    ord("P"): "PERSID",
    0x92: "NEWOBJ_EX",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
}
_FOREIGN = {
    **{ord(letter): "a line of text" for letter in _TEXT},
    ord("T"): "a text of Python 2", ord("U"): "a text of Python 2",
    0x8F: "EMPTY_SET", 0x90: "ADDITEMS", 0x91: "FROZENSET", 0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
}  # fmt: skip


class Machine:
    """Interprets one pickle.

    Args:
        data: where it lies.
        start: of its first byte.
        end: one past the last byte that it may take.
        part: what messages call it.
        persistent: makes an object of a persistent id.
        python2: read texts of Python 2, which may hold bytes: a letter for each, as ``encoding="latin1"`` has it.
    """

    def __init__(
        self,
        data: Any,
        start: int,
        end: int,
        part: str,
        persistent: Callable[[Any, str], Any] | None = None,
        *,
        python2: bool = False,
    ) -> None:
        self.data, self.at, self.end, self.part, self.persistent = data, start, end, part, persistent
        self.actions = {**_ACTIONS, **_PYTHON2} if python2 else _ACTIONS
        self.start = start
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object that the pickle describes; :attr:`at` is behind it then."""
        while True:
            opcode = self.take(1)[0]
            if opcode == 0x2E:  # STOP
                if self.marks:
                    raise self.fault("a closed mark at the end", f"{len(self.marks)} open ones")
                return self.pop()
            action = self.actions.get(opcode)
            if action is None:
                raise self.refuse(opcode)
            action(self)
            if len(self.stack) > MAX_STACK or len(self.marks) > MAX_MARKS:
                got = f"{len(self.stack)} and {len(self.marks)}"
                raise Refused(
                    "limit", self.where, f"at most {MAX_STACK} values and {MAX_MARKS} marks", got, "save less"
                )

    @property
    def where(self) -> str:
        return f"{self.part}, byte {self.at - self.start}"

    def fault(self, expected: str, got: str) -> Refused:
        return damaged(self.where, expected, got)

    def refuse(self, opcode: int) -> Refused:
        if opcode in _CODE:
            remedy = "do not open this file with pickle or torch.load; save plain values instead"
            return Refused("code", self.where, "plain values", f"{_CODE[opcode]}, which calls what it names", remedy)
        if opcode in _FOREIGN:
            expected = "what plain values are written with in protocols 2 to 5"
            return Refused("unsupported", self.where, expected, _FOREIGN[opcode], "save plain values again")
        return self.fault("an opcode of pickle", f"{opcode:#04x}")

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise self.fault(f"{count} more bytes", f"{self.end - self.at}")
        taken = self.data[self.at : self.at + count]
        self.at += count
        return taken if isinstance(taken, bytes) else bytes(taken)

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        stop = self.data.find(b"\n", self.at, min(self.end, self.at + MAX_NAME))
        if stop < 0:
            raise self.fault(f"a name of less than {MAX_NAME} bytes", "a longer one or the end")
        return self.decode(self.take(stop - self.at + 1)[:-1])

    def decode(self, text: bytes) -> str:
        try:
            return text.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.fault("text in UTF-8", "other bytes") from None

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.fault("a value on the stack", "none")
        return self.stack.pop()

    def discard(self) -> None:
        self.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.fault("a mark on the stack", "none")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def remember(self, key: int) -> None:
        self.memo[key] = self.top()

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise self.fault("a value in the memo", f"none at {key}")
        self.push(self.memo[key])

    def integer(self, width: int) -> None:
        if width > MAX_INTEGER_BYTES:
            raise self.fault(f"an integer of at most {MAX_INTEGER_BYTES} bytes", str(width))
        self.push(int.from_bytes(self.take(width), "little", signed=True))

    def items(self, pairs: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(pairs) % 2:
            raise self.fault("a mapping and pairs for it", quote(type(target).__name__))
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int):
                raise self.fault("text or an integer as a key", quote(key))
            if key in target:
                raise self.fault("every key once", f"{quote(key)} twice")
            target[key] = value

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise self.fault("a list to append to", quote(type(target).__name__))
        target.extend(values)

    # --- opcodes that do more than push ------------------------------------------------------------------------------

    def proto(self) -> None:
        version = self.number(1)
        if not 2 <= version <= 5:
            raise self.fault("pickle protocol 2 to 5", str(version))

    def frame(self) -> None:
        length = self.number(8)
        if length > self.end - self.at:
            raise self.fault(f"a frame of at most {self.end - self.at} bytes", str(length))

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def dictionary(self) -> None:
        pairs = self.pop_mark()
        self.push({})
        self.items(pairs)

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.items([key, value])

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self.fault("two names", quote((module, name)))
        self.push(find(module, name, self.where))

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Constructor) or not isinstance(args, tuple):
            raise Refused("code", self.where, "a call of something listed", quote(function), "save plain values")
        self.push(function.call(args))

    def new_object(self) -> None:
        args, name = self.pop(), self.pop()
        self.push(make(name, args, self.where))

    def build(self) -> None:
        state = self.pop()
        set_state(self.top(), state, self.where)

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise self.fault("no persistent id here", "one")
        self.push(self.persistent(self.pop(), self.where))


_ACTIONS: dict[int, Callable[[Machine], None]] = {
    0x80: Machine.proto,
    0x95: Machine.frame,
    ord("("): Machine.mark,
    ord("0"): Machine.discard,
    ord("1"): lambda m: m.pop_mark().clear(),
    ord("2"): lambda m: m.push(m.top()),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.integer(4),
    ord("K"): lambda m: m.push(m.number(1)),
    ord("M"): lambda m: m.push(m.number(2)),
    0x8A: lambda m: m.integer(m.number(1)),
    0x8B: lambda m: m.integer(m.number(4)),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("X"): lambda m: m.push(m.decode(m.take(m.number(4)))),
    0x8C: lambda m: m.push(m.decode(m.take(m.number(1)))),
    0x8D: lambda m: m.push(m.decode(m.take(m.number(8)))),
    ord("B"): lambda m: m.push(m.take(m.number(4))),
    ord("C"): lambda m: m.push(m.take(m.number(1))),
    0x8E: lambda m: m.push(m.take(m.number(8))),
    0x96: lambda m: m.push(m.take(m.number(8))),
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: m.push(m.pop_mark()),
    ord("a"): lambda m: m.extend([m.pop()]),
    ord("e"): lambda m: m.extend(m.pop_mark()),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("}"): lambda m: m.push({}),
    ord("d"): Machine.dictionary,
    ord("s"): Machine.set_item,
    ord("u"): lambda m: m.items(m.pop_mark()),
    ord("c"): lambda m: m.push(find(m.line(), m.line(), m.where)),
    0x93: Machine.stack_global,
    ord("R"): Machine.reduce,
    0x81: Machine.new_object,
    ord("b"): Machine.build,
    ord("Q"): Machine.persistent_id,
    ord("q"): lambda m: m.remember(m.number(1)),
    ord("r"): lambda m: m.remember(m.number(4)),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("h"): lambda m: m.recall(m.number(1)),
    ord("j"): lambda m: m.recall(m.number(4)),
}
_PYTHON2: dict[int, Callable[[Machine], None]] = {
    ord("T"): lambda m: m.push(m.take(m.number(4)).decode("latin-1")),
    ord("U"): lambda m: m.push(m.take(m.number(1)).decode("latin-1")),
}
