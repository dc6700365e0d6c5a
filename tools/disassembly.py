"""What a compiled kernel consists of, read from its machine code: registers, widths of loads and stores, kinds of work.

A kernel that lost its 128-bit loads or gained a division still passes every test, at half the speed; its disassembly
shows that without a GPU. Needs ``cuobjdump``, of the CUDA toolkit or of the triton package.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tools import toolchain

KINDS = {
    "float": ("FFMA", "FADD", "FMUL", "FMNMX", "FSETP", "FSEL", "HFMA2", "HADD2", "HMUL2"),
    "double": ("DFMA", "DADD", "DMUL", "DSETP"),
    "special": ("MUFU",),
    "integer": ("IMAD", "IADD3", "LOP3", "ISETP", "SHF", "LEA", "UIMAD", "UIADD3", "VIADD", "IADD"),
    "shuffle": ("SHFL", "REDUX"),
    "barrier": ("BAR",),
    "atomic": ("ATOM", "ATOMG", "ATOMS", "RED"),
    "local": ("LDL", "STL"),
}
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)")
IDLE = ("NOP", "BRA")  # padding behind the end of a kernel


@dataclass(frozen=True)
class Profile:
    """One kernel on one architecture."""

    registers: int
    stack: int  # bytes
    shared: int  # bytes, static
    instructions: int  # in the code, whatever is executed of them
    loads: dict[str, int]  # width in bytes -> global loads in the code
    stores: dict[str, int]
    kinds: dict[str, int]  # see KINDS

    def widest(self, moves: str) -> int:
        """Bytes of the widest ``"loads"`` or ``"stores"``, 0 without any."""
        return max(map(int, getattr(self, moves)), default=0)

    def record(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def find_cuobjdump() -> str | None:
    """On PATH, beside nvcc, or the one that comes with triton.

    Example:
        >>> tool = find_cuobjdump()
        >>> tool is None or tool.endswith("cuobjdump")
        True
    """
    if found := shutil.which("cuobjdump"):
        return found
    candidates = []
    if nvcc := toolchain.find_nvcc():
        candidates.append(Path(nvcc).with_name("cuobjdump"))
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((str(path) for path in candidates if path.exists()), None)


def profiles(cubin: Path, cuobjdump: str) -> dict[str, Profile]:
    """Kernel (mangled) -> its profile."""
    usage = _run(cuobjdump, "-res-usage", cubin)
    code = _run(cuobjdump, "-sass", cubin)
    resources = parse_usage(usage)
    return {name: _profile(resources[name], lines) for name, lines in split_functions(code).items()}


def parse_usage(text: str) -> dict[str, tuple[int, int, int]]:
    """Kernel -> registers, stack bytes, shared bytes, from ``cuobjdump -res-usage``.

    Example:
        >>> parse_usage(" Function k:\\n  REG:40 STACK:8 SHARED:64 LOCAL:0 CONSTANT[0]:588 TEXTURE:0")
        {'k': (40, 8, 64)}
    """
    found = {}
    for name, body in re.findall(r"Function (\S+):\s*\n\s*(REG.*)", text):
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", body)}
        found[name] = (numbers["REG"], numbers.get("STACK", 0), numbers.get("SHARED", 0))
    return found


def split_functions(text: str) -> dict[str, list[str]]:
    """Kernel -> opcodes with their suffixes, in order, from ``cuobjdump -sass``.

    Example:
        >>> split_functions("Function : k\\n    /*0000*/    @!P0 LDG.E.128 R4, [R2] ;   /* 0x1 */\\n")
        {'k': ['LDG.E.128']}
    """
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := re.search(r"Function : (\S+)", line):
            lines = found.setdefault(header[1], [])
        elif code := INSTRUCTION.match(line):
            lines.append(code[1])
    return found


def width(opcode: str) -> int:
    """Bytes that a load or store moves for each thread.

    Example:
        >>> [width(code) for code in ("LDG.E.128.CONSTANT", "STG.E.64", "LDG.E", "LDG.E.U8", "STG.E.U16")]
        [16, 8, 4, 1, 2]
    """
    for part in opcode.split("."):
        if part in ("256", "128", "64"):
            return int(part) // 8
        if part in ("U8", "S8"):
            return 1
        if part in ("U16", "S16"):
            return 2
    return 4


def _profile(resources: tuple[int, int, int], opcodes: Iterable[str]) -> Profile:
    names = [(opcode.partition(".")[0], opcode) for opcode in opcodes]
    names = [(name, opcode) for name, opcode in names if name not in IDLE]
    moves = {
        kind: Counter(str(width(opcode)) for name, opcode in names if name == code)
        for kind, code in (("loads", "LDG"), ("stores", "STG"))
    }
    counts = Counter(name for name, _ in names)
    kinds = {kind: sum(counts[name] for name in members) for kind, members in KINDS.items()}
    registers, stack, shared = resources
    return Profile(
        registers, stack, shared, len(names), _sorted(moves["loads"]), _sorted(moves["stores"]),
        {kind: count for kind, count in kinds.items() if count},
    )  # fmt: skip


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return {size: counts[size] for size in sorted(counts, key=int)}


def _run(tool: str, option: str, cubin: Path) -> str:
    return subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout
