"""What the ``bdfast`` command sets in its own process before it imports anything else: Ctrl-C, and the heap.

Without the first an interruption while it imports ends in a traceback, of an import that has nothing to do with it;
:func:`bdfast.cli.main` sees to it from then on. Without the second every batch on a CPU gives its activations back to
the system, and has the next ones zeroed page by page. Programs that import the package are not touched.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
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


def keep_heap() -> None:
    """Let glibc keep up to 2 GB of freed memory, and take blocks of up to 32 MB from it, unless the user has said.

    32 MB is the most that it allows; larger blocks go back to the system at once, as before.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


if is_command():
    leave_at_interrupt()
    keep_heap()
