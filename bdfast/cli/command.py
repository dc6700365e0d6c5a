"""What a subcommand is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

DONE, FINDING, FAILED, INTERRUPTED = 0, 1, 2, 130


def exit_codes(finding: str = "") -> str:
    """The line of a help page; ``finding`` says when a command ends with 1, where it does.

    Example:
        >>> exit_codes()
        'exit codes: 0 done, 2 failed, 130 interrupted'
    """
    return f"exit codes: 0 done,{f' 1 {finding},' if finding else ''} 2 failed, 130 interrupted"


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: as typed.
        summary: one line of the list of commands.
        description: opens its own help.
        example: command lines that close its help.
        add_arguments: adds its options to a parser.
        run: does the work, and returns the exit code.
        finding: of a command that may end with 1, when it does.
    """

    name: str
    summary: str
    description: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    finding: str = ""
