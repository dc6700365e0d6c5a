"""Optimizers over the ops."""

from __future__ import annotations

from bdfast.optim.projected_sgd import ProjectedSGD

__all__ = ["ProjectedSGD"]
