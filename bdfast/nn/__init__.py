"""Drop-in modules."""

from __future__ import annotations

from bdfast.nn.clip_activations import ClippedModel, clip_activations
from bdfast.nn.clipped_relu import ClippedReLU
from bdfast.nn.normalize import Normalize, Normalized, normalized

__all__ = ["ClippedModel", "ClippedReLU", "Normalize", "Normalized", "clip_activations", "normalized"]
