"""``bdfast defend pad-ft``: PAD-FT as the command calls a defense."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from bdfast.attacks import PoisonedData
from bdfast.defenses import PadFTConfig, PadFTResult, pad_ft


def defend(
    model: nn.Module, poisoned: PoisonedData, config: PadFTConfig, *, checkpoint: str | os.PathLike[str], **options: Any
) -> PadFTResult:
    """Run it; its scores lie in a folder beside ``checkpoint`` and outlast a run that is interrupted."""
    folder = Path(checkpoint).with_suffix(".scores")
    result = pad_ft(model, poisoned, config, scores_dir=folder, **options)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return result
