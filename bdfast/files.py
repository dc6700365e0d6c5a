"""Writing files so that nothing is lost: a reader sees the old file or the whole new one, never a part."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Literal, overload

from bdfast.errors import message


@overload
def atomic_write(
    path: str | os.PathLike[str], mode: Literal["w"] = ..., *, newline: str | None = ...
) -> AbstractContextManager[IO[str]]: ...


@overload
def atomic_write(path: str | os.PathLike[str], mode: Literal["wb"]) -> AbstractContextManager[IO[bytes]]: ...


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w", *, newline: str | None = None) -> Iterator[IO[Any]]:
    """Open a file that takes the place of ``path`` when the block ends, and leaves no trace if it raises.

    Args:
        path: in a folder that exists; a file there is replaced.
        mode: ``"w"`` for text in UTF-8, ``"wb"`` for bytes.
        newline: of text, as in :func:`open` (``""`` for the csv module).

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
                file.flush()
                os.fsync(file.fileno())  # or a crash may leave the new name on an empty file
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
