"""One switch for all accelerated functions: ``BDFAST_REFERENCE=1`` runs the plain form of each."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

VARIABLE = "BDFAST_REFERENCE"

P = ParamSpec("P")
R = TypeVar("R")


def reference_requested() -> bool:
    """Whether ``BDFAST_REFERENCE`` is set to anything but ``0``; read at every call.

    Example:
        >>> reference_requested()
        False
    """
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def switchable(plain: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: calls go to ``plain``, of the same signature, while the switch is on.

    Example:
        >>> @switchable(lambda x: f"plain {x}")
        ... def f(x):
        ...     return f"fast {x}"
        >>> f(1)
        'fast 1'
    """

    def decorate(fast: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(fast)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return (plain if reference_requested() else fast)(*args, **kwargs)

        return call

    return decorate
