"""Parser, dispatch, and what becomes of errors."""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, cast

from bdfast import _startup
from bdfast._version import __version__
from bdfast.cli.command import FAILED, INTERRUPTED, Command
from bdfast.cli.commands import attack, bb, bench, convert, defend, demo, doctor, evaluate, score
from bdfast.errors import message

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

EXIT_CODES = "exit codes: 0 done, 1 a finding (doctor), 2 failed, 130 interrupted"


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
    with warnings.catch_warnings():
        warnings.showwarning = cast(Any, _show_warning)
        _startup.hand_over()
        try:
            code: int = options.run(options)
        except KeyboardInterrupt as interrupt:
            kept = str(interrupt) or "nothing was written"
            print(f"\ninterrupted: {kept}", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:  # every failure is one message and an exit code
            if getattr(options, "traceback", False):
                traceback.print_exc()
            print(f"error: {_describe(error)}", file=sys.stderr)
            return FAILED
    return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="bdfast",
        description="Detoxify backdoored neural networks, and look into what runs where.",
        epilog=f"{EXIT_CODES}\n'bdfast COMMAND --help' lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bdfast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        one = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            epilog=f"examples:\n{command.example}\n\n{EXIT_CODES}",
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
        errno.EROFS: ("a place that can be written", "choose another path"),
        errno.EACCES: ("a path with permission", "choose another path, or change its permissions"),
        errno.EPERM: ("a path with permission", "choose another path, or change its permissions"),
    }.get(error.errno or 0, ("a path that can be used", "check the path"))
    return message("bdfast", str(error.filename or "file"), expected, error.strerror or type(error).__name__, remedy)


def _show_warning(text: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"warning: {text}", file=sys.stderr)
