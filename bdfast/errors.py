"""Errors in three parts: what was expected, what came, what to do.

Every message names the function and the argument (or the file) it speaks of, so that a user can act on it without
reading the source::

    >>> print(message("poison", "rate", "a number in (0, 1]", "1.5", "pass the fraction of the set to poison"))
    poison: `rate` expected a number in (0, 1], got 1.5; pass the fraction of the set to poison
"""

from __future__ import annotations

import importlib
from types import ModuleType


class LabelRangeError(IndexError, ValueError):
    """A class label lies outside ``[0, num_classes)``.

    PyTorch raises ``IndexError`` for this and scikit-learn ``ValueError``: callers of either habit catch it.
    """


class ModelInputError(ValueError, RuntimeError):
    """A model raised a RuntimeError over the images it was given.

    It is both: the images are a wrong value for the caller of bdfast, and whoever expects what PyTorch raises gets it.
    """


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def message(where: str, argument: str, expected: str, got: str, remedy: str) -> str:
    """One sentence in three parts: ``where: `argument` expected ..., got ...; remedy``."""
    return printable(f"{where}: `{argument}` expected {expected}, got {got}; {remedy}")


def printable(text: str) -> str:
    """Text that may come from a stranger's file, without what a terminal would obey.

    Example:
        >>> printable("\x1b[2Jweight")
        '?[2Jweight'
    """
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)


def optional_import(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Args:
        module: dotted module name, such as ``"sklearn.datasets"``.
        extra: the extra of bdfast that installs it.
        purpose: what it is needed for, as it should read after "is needed".

    Raises:
        MissingExtraError: the module is not installed.

    Example:
        >>> optional_import("json", extra="data", purpose="to read files").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"bdfast: the package `{package}` is needed {purpose}, but it could not be imported ({error}); "
            f"install it with: pip install 'bdfast[{extra}]'"
        ) from error
