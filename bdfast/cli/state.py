"""Where a run that may be interrupted keeps what the same command continues from.

It lies beside the results, in the folder that the user chose for them. A record or the folder of an attack is another
matter: it may come from a stranger, and so may a state that lies in it, whose weights would become those of the
defended model. (That a state is of this very run says nothing: what a run depends on is public.) Results that go into
such a folder have their state in a folder that is the user's alone.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from bdfast.errors import message

VARIABLE = "BDFAST_STATE"
"""The environment variable that says where such folders are made."""


def state_root() -> Path:
    """``$BDFAST_STATE``, else ``$XDG_STATE_HOME/bdfast``, else ``~/.local/state/bdfast``."""
    if own := os.environ.get(VARIABLE):
        return Path(os.path.abspath(own))
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "bdfast"


def state_folder(out: str | os.PathLike[str], foreign: Path | None) -> Path:
    """Where a run with results in ``out`` keeps its state; :func:`make_state_folder` makes it.

    Args:
        out: the folder of the results.
        foreign: a folder that may come from a stranger.

    Returns:
        ``out``, or a folder of the user's own if ``out`` lies in ``foreign``, whatever links lead there.
    """
    real = os.path.realpath(out)
    if foreign is None or not Path(real).is_relative_to(os.path.realpath(foreign)):
        return Path(out)
    return state_root() / hashlib.sha256(os.fsencode(real)).hexdigest()[:32]


def make_state_folder(where: str, state: Path) -> None:
    """Make a folder that nobody else can write to, or make sure that it is one.

    Raises:
        ValueError: it cannot be made, is a link, or is somebody else's.
    """
    try:
        state.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        state.mkdir(mode=0o700, exist_ok=True)
        status = state.lstat()
    except OSError as error:
        expected, remedy = "a place for the state of unfinished runs", "set it to a folder of your own"
        raise ValueError(message(where, VARIABLE, expected, f"{state}: {error.strerror}", remedy)) from error
    mine = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
    if not stat.S_ISDIR(status.st_mode) or not mine:
        expected, got = "a folder that only you can write to", "a link, or one that others can write to"
        raise ValueError(message(where, str(state), expected, got, f"remove it, or set {VARIABLE}"))


def note_of_foreign_state(out: str | os.PathLike[str], state: Path, names: Sequence[str]) -> str | None:
    """What to say of a state in ``out`` that is not continued from, because it belongs into ``state``."""
    there = [] if state == Path(out) else [str(Path(out) / name) for name in names if os.path.lexists(Path(out) / name)]
    return f"not continued from, and left as it is: {', '.join(there)}; this run keeps {state}" if there else None
