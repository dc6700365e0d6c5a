"""Writing files so that nothing is lost: a reader sees the old file or the whole new one, never a part."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Literal, overload

from bdfast.errors import message


def check_path(where: str, argument: str, path: object) -> None:
    """``path`` names a file or a folder, or is None.

    Example:
        >>> check_path("d3", "checkpoint", 3)
        Traceback (most recent call last):
        TypeError: d3: `checkpoint` expected a path, got int; pass text or a pathlib.Path
    """
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise TypeError(message(where, argument, "a path", type(path).__name__, "pass text or a pathlib.Path"))


@overload
def atomic_write(
    path: str | os.PathLike[str], mode: Literal["w"] = ..., *, newline: str | None = ..., sync: bool = ...
) -> AbstractContextManager[IO[str]]: ...


@overload
def atomic_write(
    path: str | os.PathLike[str], mode: Literal["wb"], *, sync: bool = ...
) -> AbstractContextManager[IO[bytes]]: ...


@contextmanager
def atomic_write(
    path: str | os.PathLike[str], mode: str = "w", *, newline: str | None = None, sync: bool = True
) -> Iterator[IO[Any]]:
    """Open a file that takes the place of ``path`` when the block ends, and leaves no trace if it raises.

    Args:
        path: in a folder that exists; a file there is replaced, and so is a link, whatever it leads to.
        mode: ``"w"`` for text in UTF-8, ``"wb"`` for bytes.
        newline: of text, as in :func:`open` (``""`` for the csv module).
        sync: wait for the disk, so that the name is not found on an empty file after a crash.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: another mode.
        OSError: the disk is full, or refuses; its ``filename`` is ``path``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(f"{folder}/result.json") as file:
        ...         _ = file.write('{"accuracy": 0.93}')
        ...     Path(folder, "result.json").read_text()
        '{"accuracy": 0.93}'
    """
    if mode not in ("w", "wb"):
        raise ValueError(message("atomic_write", "mode", '"w" or "wb"', f"{mode!r}", "write whole files"))
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(message("atomic_write", str(path), "a folder that exists", "none", "make it first"))
    beside = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.tmp")
    text: dict[str, Any] = {} if mode == "wb" else {"encoding": "utf-8", "newline": newline}
    try:
        with naming(path, beside):
            with open(beside, mode.replace("w", "x"), **text) as file:
                yield file
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def refuse_links(where: str, root: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Raise if a part of ``path`` below ``root`` is a link: what came with the folder would choose where we write.

    Args:
        where: opens the message.
        root: a folder that may come from a stranger; its own name may be a link.
        path: of a folder or a file that is to be written, there or not; one that is not below ``root`` may be a link.

    Raises:
        ValueError: with the name of the link.

    Example:
        >>> refuse_links("example", "record/x", "record/x/defense/ft")
    """
    absolute, real = Path(os.path.abspath(path)), os.path.realpath(root)
    parts = [absolute, *absolute.parents]
    top = max((depth for depth, part in enumerate(parts) if os.path.realpath(part) == real), default=0)
    for part in reversed(parts[:top]):
        if part.is_symlink():
            got, remedy = "a link", "remove it, or write to a folder of your own"
            raise ValueError(message(where, str(part), f"a file or folder inside {root}", got, remedy))


@contextmanager
def naming(path: str | os.PathLike[str], written: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """What the system refuses in the block, which writes a file, names ``path``: a full disk is told without a name.

    Args:
        path: the name that the user knows.
        written: the file that is written in its place.
    """
    try:
        yield
    except Exception as error:
        refused = _of_the_disk(error)
        if refused is None or refused.filename not in (None, os.fspath(path if written is None else written)):
            raise
        raise OSError(refused.errno, refused.strerror, os.fspath(path)) from error


def _of_the_disk(error: BaseException | None) -> OSError | None:
    """The system's error behind ``error``: torch.save raises one of its own while it gives up on a file."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None
