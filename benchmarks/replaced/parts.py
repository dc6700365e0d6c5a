"""The parts, one for each function that is replaced, and how their results are compared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bdfast.integrations.backdoorbench.accelerated import abl
from benchmarks.replaced import works
from benchmarks.replaced.part import Part


def largest(usual: Sequence[Tensor] | Tensor, ours: Sequence[Tensor] | Tensor) -> float:
    """Largest absolute difference, times the largest element where that is below 1."""
    pairs = [(usual, ours)] if isinstance(usual, Tensor) else zip(usual, ours, strict=True)
    return max(float((a - b).abs().amax() / a.abs().amax().clamp_min(1.0)) for a, b in pairs)


def elsewhere(usual: Any, ours: Any) -> float:
    """Share of the places that hold something else."""
    first, second = (torch.as_tensor(one) for one in (usual, ours))
    return float((first != second).double().mean())


def other_channels(usual: Sequence[list[Tensor]], ours: Sequence[list[Tensor] | dict[str, Tensor]]) -> float:
    """Share of the channels that one form prunes and the other keeps."""
    wrong = total = 0
    for scales, found in zip(usual, ours, strict=True):
        for place, scale in enumerate(scales):
            if isinstance(found, dict):
                pruned = torch.zeros_like(scale, dtype=torch.bool)
                pruned[list(found.values())[place]] = True
            else:
                pruned = found[place] == 0
            wrong, total = wrong + int(((scale == 0) != pruned).sum()), total + len(scale)
    return wrong / total


PROJECTIONS = ("Shared_PGD.projection", "NPD.projection")
PERTURBATIONS = "{batch} perturbations of 3 x {side} x {side}"
LOSS = "value and gradient of {batch} rows of 10 logits"
LGA = partial(works.loss, abl.plain_lga_loss, abl.lga_loss)
FLOODING = partial(works.loss, abl.plain_flooding_loss, abl.flooding_loss)
L1, L2 = (partial(works.projections, norm) for norm in ("L1", "L2"))

# fmt: off
F32: dict[str, Any] = {"difference": largest, "allowed": 1e-6}
F64: dict[str, Any] = {"difference": largest, "allowed": 1e-9, "weight": 10, "compared_in": torch.float64}
SAME: dict[str, Any] = {"difference": elsewhere, "allowed": 0.0, "weight": 10, "compared_in": torch.float64}
CHANNELS: dict[str, Any] = {"difference": other_channels, "allowed": 1e-3, "weight": 6}

PARTS = (
    Part("abl", ("compute_loss_value",), "loss ranking of {images} images, {network}", 1.6, works.ranking, **SAME),
    Part("lga", ("LGALoss.forward",), LOSS, None, LGA, **F32),
    Part("flooding", ("FloodingLoss.forward",), LOSS, None, FLOODING, **F32),
    Part("clp", ("CLP_prune",), "{thresholds} calls, {network}", 1.0, works.sweep, **CHANNELS),
    Part("clp-sweep", (), "`clp_sweep` of {thresholds} thresholds, {network}", 50.0, works.sweep_at_once, **CHANNELS),
    Part("entropy", ("batch_entropy",), "256 channels of two batches of {batch}", 20.0, works.entropies,
         **{**F32, "allowed": 1e-5}),
    Part("ep", ("EP_defense",), "{batch} images, {network}", 1.0, works.pruning,
         **{**CHANNELS, "weight": 10, "compared_in": torch.float64}),
    Part("sau", ("Shared_PGD.attack",), "5 steps, {attacked} images, two {network}", 1.5, works.attack,
         **{**SAME, "allowed": 1e-3}),
    Part("l1", PROJECTIONS, f"L1, {PERTURBATIONS}", 20.0, L1, **F32),
    Part("l2", PROJECTIONS, f"L2, {PERTURBATIONS}", 20.0, L2, **F32),
    Part("perturbed", ("NPD.get_perturbed_image",), f"{PERTURBATIONS}, both ways", 1.0, works.perturbed, **F32),
    Part("nad", ("AT.attention_map",), "a stage of 256 channels, both ways", 1.0, works.attention, **F32),
    Part("test", ("given_dataloader_test",), "{images} images, {network}", None, works.tested, **F64),
    Part("asr-ra", ("eval_step",), "ASR and RA of {images} images, {network}", 1.8, works.asr_and_ra, **F64),
    Part("evaluation", ("eval_step",), "ACC, ASR and RA of {images} images, {network}", 1.3, works.evaluated, **F64),
)
