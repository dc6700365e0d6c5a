"""What a training loop stands on: data that stays on the device, and networks that are asked but not trained."""

from __future__ import annotations

from bdfast.runtime.frozen import FrozenModel
from bdfast.runtime.ranks import Ranks, torchrun
from bdfast.runtime.resident import Augment, ResidentData, normalize
from bdfast.runtime.score_table import ScoreTable

__all__ = ["Augment", "FrozenModel", "Ranks", "ResidentData", "ScoreTable", "normalize", "torchrun"]
