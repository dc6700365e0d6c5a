"""Kernels: one function an op, the same on every backend. See :mod:`bdfast.backends` for who chooses."""

from bdfast.ops.hinge_cross_entropy import hinge_cross_entropy
from bdfast.ops.projected_sgd_step import projected_sgd_step_

__all__ = ["hinge_cross_entropy", "projected_sgd_step_"]
