"""Ctrl-C while the ``bdfast`` command still imports what it needs; :func:`bdfast.cli.main` sees to it from then on.

Without this an interruption in those seconds ends in a traceback, of an import that has nothing to do with it. Programs
that import the package are not touched.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

_INTERRUPTED = 130  # as in bdfast.cli.command, which cannot be imported yet


def is_command() -> bool:
    """Whether this process is ``bdfast ...`` or ``python -m bdfast ...``."""
    name = os.path.splitext(os.path.basename(sys.argv[0] if sys.argv else ""))[0]
    return name == "bdfast" or ("-m", "bdfast") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)


def leave_at_interrupt() -> None:
    """Until :func:`hand_over` SIGINT ends this process with one line and exit code 130, where nothing else is set."""
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def hand_over() -> None:
    """SIGINT raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def finish() -> None:
    """The command has said how it ended: Ctrl-C while Python takes itself apart, for a second, changes nothing."""
    if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(*_: object) -> None:
    os.write(2, b"\ninterrupted: nothing was written\n")
    os._exit(_INTERRUPTED)  # an exception would come out of whatever is being imported, as another one perhaps


if is_command():
    leave_at_interrupt()
