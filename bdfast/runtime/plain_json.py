"""Values in the form in which JSON holds them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any


def plain(value: Any) -> Any:
    """``value`` as JSON holds it: dataclasses as mappings, tuples as lists, numbers that are not finite as null.

    Example:
        >>> plain({"asr": float("nan"), "limit": (5, 2)})
        {'asr': None, 'limit': [5, 2]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
