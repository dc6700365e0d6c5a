"""Training of classifiers, and the loop that the defenses share with it."""

from __future__ import annotations

from bdfast.training.train_classifier import TrainConfig, TrainResult, train_classifier

__all__ = ["TrainConfig", "TrainResult", "train_classifier"]
