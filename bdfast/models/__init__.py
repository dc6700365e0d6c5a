"""Networks with the state-dict names that users of the backdoor benchmarks hold."""

from __future__ import annotations

from bdfast.models.classifier import classifier_layers
from bdfast.models.registry import build, from_state, names

__all__ = ["build", "classifier_layers", "from_state", "names"]
