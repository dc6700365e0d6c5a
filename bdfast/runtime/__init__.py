"""What a training loop stands on: data that stays on the device."""

from __future__ import annotations

from bdfast.runtime.resident import Augment, ResidentData, normalize

__all__ = ["Augment", "ResidentData", "normalize"]
