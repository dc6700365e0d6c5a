"""numpy's numbers as Python's, which are what configs hold, compare and write to JSON."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np


def plain_number(value: Any) -> Any:
    """``value``, or what it is in Python where it is one of numpy's.

    Example:
        >>> import numpy
        >>> plain_number(numpy.int64(3)), plain_number("auto")
        (3, 'auto')
    """
    return value.item() if isinstance(value, np.generic) else value


def take_plain_numbers(config: Any) -> None:
    """The same for every field of a frozen dataclass, in place: the first thing that its ``__post_init__`` does."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, np.generic):
            object.__setattr__(config, field.name, value.item())
