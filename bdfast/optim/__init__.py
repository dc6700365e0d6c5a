"""Optimizers over the ops."""

from __future__ import annotations

from bdfast.optim.projected_sgd import ProjectedSGD
from bdfast.optim.sam import SAM

__all__ = ["SAM", "ProjectedSGD"]
