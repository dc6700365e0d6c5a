"""The process that reads: limits first, then the file, then a description in the folder it was given.

Started as ``python -I -S -c ... FOLDER FILE OUT LIMITS FORM`` with no input and no environment; what it says goes to
``OUT/description.json`` and ``OUT/blob.bin``.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import sys
from typing import Any

from .container import read, read_pickle
from .describe import Describer
from .refused import SYSTEM, Refused

_FORBIDDEN = (
    "socket.", "subprocess.", "ctypes.", "pickle.", "marshal.", "os.system", "os.exec", "os.fork", "os.posix_spawn",
    "os.spawn", "os.kill", "os.putenv", "os.remove", "os.rename", "os.link", "os.symlink", "os.chmod", "shutil.",
    "import", "exec", "compile",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Read one file; 0 if a description or a refusal was written, :data:`SYSTEM` + errno if the system let neither."""
    file, out, limits, form = arguments[0], arguments[1], json.loads(arguments[2]), arguments[3]
    try:
        try:
            confine(limits)
            answer = describe(file, out, limits, form)
        except Refused as refused:
            reasons = (refused.kind, refused.field, refused.expected, refused.got, refused.remedy)
            answer = {"refused": [reason[:400] for reason in reasons]}
        except MemoryError:
            answer = {"refused": ["limit", "the file", "to fit the memory that is allowed", "more", "raise the limit"]}
        with open(os.path.join(out, "description.json"), "w", encoding="utf-8") as stream:
            json.dump(answer, stream, allow_nan=False, check_circular=False)
    except OSError as error:  # on a full disk there is no other way to say so
        return SYSTEM + (error.errno or 0)
    return 0


def confine(limits: dict[str, int]) -> None:
    """Bound memory, time and the size of files, and forbid what reading never needs.

    Nothing below executes what it reads; these are for the day when that turns out to be wrong.
    """
    try:
        import resource
    except ImportError:  # Windows: the caller's timeout remains
        pass
    else:
        wanted = {
            resource.RLIMIT_AS: limits["memory"],
            resource.RLIMIT_CPU: limits["seconds"],
            resource.RLIMIT_FSIZE: limits["blob"] + (1 << 30),
            resource.RLIMIT_NOFILE: 32,
            resource.RLIMIT_CORE: 0,
        }
        for kind, value in wanted.items():
            bound = min([value, *(own for own in resource.getrlimit(kind) if own != resource.RLIM_INFINITY)])
            resource.setrlimit(kind, (bound, bound))
    "".encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")  # look codecs up before imports are forbidden
    "".encode("latin-1").decode("ascii")
    json.dumps({"": [0.5, "\u00e9"]}, check_circular=False)
    sys.addaudithook(_watch)


def _watch(event: str, _: Any) -> None:
    if event.startswith(_FORBIDDEN):
        os._exit(3)


def describe(file: str, out: str, limits: dict[str, int], form: str) -> dict[str, Any]:
    """The description of ``file``, which is of a :data:`Form`; raw bytes go to the blob."""
    with open(file, "rb") as stream, open(os.path.join(out, "blob.bin"), "wb") as blob:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= limits["file"]:
            raise Refused(
                "limit",
                "the file",
                f"1 to {limits['file']} bytes",
                str(status.st_size),
                "raise the limit if you know it",
            )
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            contents = (read_pickle if form == "pickle" else read)(data, limits["pickle"])
            return Describer(data, contents, blob, limits["blob"], limits["values"]).describe()
