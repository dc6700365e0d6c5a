"""Parser, dispatch, and what becomes of errors."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO, cast

from bdfast import _startup
from bdfast._version import __version__
from bdfast.cli.command import FAILED, INTERRUPTED, Command, exit_codes
from bdfast.cli.commands import attack, bb, bench, convert, defend, demo, doctor, evaluate, score
from bdfast.errors import message

_OUTPUT = "standard output"

COMMANDS: tuple[Command, ...] = (
    doctor.COMMAND,
    demo.COMMAND,
    attack.COMMAND,
    defend.COMMAND,
    score.COMMAND,
    evaluate.COMMAND,
    convert.COMMAND,
    bb.COMMAND,
    bench.COMMAND,
)

_FINDERS = " and ".join(command.name for command in COMMANDS if command.finding)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``bdfast`` command.

    Args:
        arguments: the words after ``bdfast``; by default those of this process.

    Returns:
        The exit code: 0 done, 1 a finding, 2 failed, 130 interrupted. Wrong arguments and ``--help`` leave through
        ``SystemExit``, as argparse does (2 and 0).

    Example:
        >>> main(["evaluate", "--model", "nowhere.pt", "--data", "digits"])  # the message goes to standard error
        2
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    output = cast(TextIO, _Output(sys.stdout))
    with warnings.catch_warnings(), redirect_stdout(output):
        warnings.showwarning = cast(Any, _show_warning)
        _startup.hand_over()
        code = _run(options)
        _startup.finish()
    return code


class _Output:
    """Standard output whose errors, unlike Python's own, have a name."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream  # None in a process without one, such as pythonw

    def write(self, text: str) -> int:
        with self._named():
            return len(text) if self._stream is None else self._stream.write(text)

    def flush(self) -> None:
        if self._stream is not None:
            with self._named():
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, _OUTPUT) from error


def _run(options: argparse.Namespace) -> int:
    """The exit code, everything said."""
    code = FAILED
    try:
        code = options.run(options)
    except KeyboardInterrupt as interrupt:
        _startup.finish()
        _drop_interruption()
        code = INTERRUPTED
        print(f"\ninterrupted: {str(interrupt) or 'nothing was written'}", file=sys.stderr)
    except Exception as error:  # every failure is one message and an exit code
        if getattr(options, "traceback", False):
            traceback.print_exc()
        _say(error)
        _flush()
        return FAILED
    if (refusal := _flush()) is None:
        return code
    _say(refusal)
    return code if isinstance(refusal, BrokenPipeError) else FAILED


def _say(error: Exception) -> None:
    if not (isinstance(error, BrokenPipeError) and error.filename == _OUTPUT):  # a reader that has seen enough, as head
        print(f"error: {_describe(error)}", file=sys.stderr)


def _flush() -> OSError | None:
    """Write what ``print`` has left in its buffer; the system's refusal, if it refuses.

    Python would try once more at its end, with a complaint and exit code 120, and thus writes elsewhere from then on.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        elsewhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(elsewhere, sys.stdout.fileno())
        os.close(elsewhere)
        return error
    return None


def _drop_interruption() -> None:
    """Python forgets about an interruption inside ``exec`` of text, over which it would end by SIGINT, not with 130."""
    exec("")  # where it remembers it is set anew whenever a text is run


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="bdfast",
        description="Detoxify backdoored neural networks, and look into what runs where.",
        epilog=f"{exit_codes(f'a finding ({_FINDERS})')}\n'bdfast COMMAND --help' lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bdfast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        one = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            epilog=f"examples:\n{command.example}\n\n{exit_codes(command.finding)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(one)
        one.add_argument("--traceback", action="store_true", help="show where an error was raised, for bug reports")
        one.set_defaults(run=command.run)
    return parser


def _describe(error: Exception) -> str:
    """The message; with its kind in front where it is not one of ours, which name function and argument."""
    if isinstance(error, OSError) and error.errno is not None:
        return _describe_refusal(error)
    text = str(error).strip()
    ours = isinstance(error, (ValueError, TypeError, IndexError, ImportError, FileNotFoundError, FloatingPointError))
    return text if ours and text else f"{type(error).__name__}: {text}"


def _describe_refusal(error: OSError) -> str:
    """What the system refused, in the three parts that every message has."""
    expected, remedy = {
        errno.ENOSPC: ("room to write", "free some space, then give the same command again"),
        errno.EDQUOT: ("room to write", "free some space, then give the same command again"),
        errno.EFBIG: ("a size that is allowed", "raise the limit (ulimit -f), or choose a path on another file system"),
        errno.EROFS: ("a place that can be written", "choose another path"),
        errno.EACCES: ("a path with permission", "choose another path, or change its permissions"),
        errno.EPERM: ("a path with permission", "choose another path, or change its permissions"),
    }.get(error.errno or 0, ("a path that can be used", "check the path"))
    return message("bdfast", str(error.filename or "file"), expected, error.strerror or type(error).__name__, remedy)


def _show_warning(text: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"warning: {text}", file=sys.stderr)
