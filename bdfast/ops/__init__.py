"""Kernels: one function an op, the same on every backend. See :mod:`bdfast.backends` for who chooses."""

from bdfast.ops.batch_norm_clipped_relu import batch_norm_clipped_relu
from bdfast.ops.batch_norm_relu import batch_norm_relu
from bdfast.ops.batch_norm_stat_distance import batch_norm_stat_distance
from bdfast.ops.bounded_ascent_cross_entropy import bounded_ascent_cross_entropy
from bdfast.ops.clipped_relu import clipped_relu
from bdfast.ops.hinge_cross_entropy import hinge_cross_entropy
from bdfast.ops.histogram_entropy import histogram_entropy
from bdfast.ops.kl_divergence import kl_divergence
from bdfast.ops.largest_scores import largest_scores
from bdfast.ops.linear_sce_margin import linear_sce_margin
from bdfast.ops.masked_pgd_step import masked_pgd_step_
from bdfast.ops.masked_random_start import masked_random_start
from bdfast.ops.patch_centers import patch_centers
from bdfast.ops.projected_sgd_step import projected_sgd_step_
from bdfast.ops.scale_to_ball import scale_to_ball_
from bdfast.ops.sce_loss import sce_loss
from bdfast.ops.sce_margin import sce_margin
from bdfast.ops.smallest_per_class import smallest_per_class

__all__ = [
    "batch_norm_clipped_relu",
    "batch_norm_relu",
    "batch_norm_stat_distance",
    "bounded_ascent_cross_entropy",
    "clipped_relu",
    "hinge_cross_entropy",
    "histogram_entropy",
    "kl_divergence",
    "largest_scores",
    "linear_sce_margin",
    "masked_pgd_step_",
    "masked_random_start",
    "patch_centers",
    "projected_sgd_step_",
    "scale_to_ball_",
    "sce_loss",
    "sce_margin",
    "smallest_per_class",
]
