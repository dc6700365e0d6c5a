"""The user's wish for a backend: argument, context, environment."""

from __future__ import annotations

import os
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any, Literal, get_args

import torch

from bdfast.errors import message

BackendName = Literal["auto", "reference", "cpp", "cuda", "triton"]
BACKENDS: tuple[str, ...] = get_args(BackendName)

# Plain module globals, not context variables: torch.compile guards on them, so that a compiled function follows them.
_forced: str | None = None
_debug: bool = False

# The dictionary behind os.environ, where Python keeps it there: to find out through os.environ itself that a variable
# is not set takes a microsecond, in which a kernel is through a batch of CIFAR-10's logits.
_VARIABLES: Any = getattr(os.environ, "_data", None)
_KEY = os.environ.encodekey("BDFAST_BACKEND")
_DEBUG_KEY = os.environ.encodekey("BDFAST_DEBUG")


def validate(name: str, where: str) -> str:
    """Return ``name`` if it is a backend's name, else raise ``ValueError``."""
    if name not in BACKENDS:
        raise ValueError(message(where, "backend", f"one of {', '.join(BACKENDS)}", repr(name), "correct the name"))
    return name


def requested(argument: str, where: str) -> str:
    """The backend asked for by the argument, else by the enclosing ``with bdfast.backend(...)``, else the environment.

    ``"auto"`` under ``torch.compile``, whose code asks the environment where it runs.
    """
    if argument != "auto":
        return validate(argument, where)
    if _forced is not None:
        return _forced
    return "auto" if torch.compiler.is_compiling() else from_environment()


def from_environment() -> str:
    """The backend named by ``BDFAST_BACKEND``, or ``"auto"``."""
    if _VARIABLES is not None and _KEY not in _VARIABLES:
        return "auto"
    name = os.environ.get("BDFAST_BACKEND")
    return validate(name, "BDFAST_BACKEND") if name else "auto"


def debug_enabled() -> bool:
    """Whether value checks that need a device sync are on (``with bdfast.debug():`` or ``BDFAST_DEBUG=1``)."""
    if _VARIABLES is not None and _DEBUG_KEY not in _VARIABLES:
        return _debug
    return _debug or os.environ.get("BDFAST_DEBUG", "0") not in ("", "0")


class backend(ContextDecorator):
    """Run every op in the block on one backend; process-wide, reentrant, usable as a decorator.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``.

    Raises:
        ValueError: unknown name.

    Example:
        >>> import torch, bdfast
        >>> with bdfast.backend("reference"):
        ...     loss = bdfast.ops.hinge_cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]), 0.1)
        >>> f"{loss:.4f}"
        '1.2863'
    """

    def __init__(self, name: BackendName) -> None:
        self.name = validate(name, "bdfast.backend")
        self._previous: list[str | None] = []

    def __enter__(self) -> backend:
        global _forced
        self._previous.append(_forced)
        _forced = None if self.name == "auto" else self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self._previous.pop()


class debug(ContextDecorator):
    """Check values on the GPU too (label ranges), at the price of a sync a call.

    Example:
        >>> import bdfast
        >>> with bdfast.debug():
        ...     bdfast.backends.debug_enabled()
        True
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._previous: list[bool] = []

    def __enter__(self) -> debug:
        global _debug
        self._previous.append(_debug)
        _debug = self.enabled
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _debug
        _debug = self._previous.pop()
