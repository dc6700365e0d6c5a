"""What a training loop stands on: data that stays on the device, and networks that are asked but not trained."""

from __future__ import annotations

from bdfast.runtime.frozen import FrozenModel
from bdfast.runtime.resident import Augment, ResidentData, normalize

__all__ = ["Augment", "FrozenModel", "ResidentData", "normalize"]
