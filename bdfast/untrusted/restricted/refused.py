"""Why a file is not read."""

from __future__ import annotations

from typing import Literal

Kind = Literal["code", "damaged", "limit", "unsupported"]

Form = Literal["torch.save", "pickle"]

SYSTEM = 64  # exit codes of the process that reads: above this, the system's errno


class Refused(Exception):
    """A file, or a part of it, that is not read.

    Attributes:
        kind: "code": it asks to run something; "damaged": its parts contradict each other; "limit": more than is read;
            "unsupported": harmless perhaps, and not read here.
        field: which part.
        expected, got, remedy: the three parts of the message.
    """

    def __init__(self, kind: Kind, field: str, expected: str, got: str, remedy: str) -> None:
        super().__init__(kind, field, expected, got, remedy)
        self.kind: Kind = kind
        self.field, self.expected, self.got, self.remedy = field, expected, got, remedy


def damaged(field: str, expected: str, got: str) -> Refused:
    """Parts that contradict each other."""
    return Refused("damaged", field, expected, got, "fetch or save the file again")


def quote(value: object, limit: int = 80) -> str:
    """A value from the file as it may be shown: short, and without what a terminal would obey."""
    if isinstance(value, (str, bytes)):
        return ascii(value[:limit])
    if isinstance(value, (int, float)) and (not isinstance(value, int) or value.bit_length() <= 128):
        return ascii(value)
    path = getattr(value, "path", None)  # of a name or a constructor
    return ascii(path)[1:-1] if isinstance(path, str) else f"a {type(value).__name__.lower()}"
