"""Drop-in modules."""

from __future__ import annotations

from bdfast.nn.normalize import Normalize, Normalized, normalized

__all__ = ["Normalize", "Normalized", "normalized"]
