"""Which name of BackdoorBench each accelerated function stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bdfast.integrations.backdoorbench.accelerated import abl, clp, entropy, evaluation, nad, npd, sau

REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "compute_loss_value": abl.compute_loss_value,
    "LGALoss.forward": abl.lga_loss,
    "FloodingLoss.forward": abl.flooding_loss,
    "CLP_prune": clp.CLP_prune,
    "batch_entropy": entropy.batch_entropy,
    "EP_defense": entropy.EP_defense,
    "Shared_PGD.attack": sau.shared_pgd_attack,
    "Shared_PGD.projection": sau.shared_pgd_projection,
    "NPD.projection": npd.projection,
    "NPD.get_perturbed_image": npd.get_perturbed_image,
    "AT.attention_map": nad.attention_map,
    "given_dataloader_test": evaluation.given_dataloader_test,
}
"""A function by its name in a module, a method by class and name."""

EVALUATIONS: tuple[Callable[..., Any], ...] = (evaluation.eval_step, evaluation.eval_step_of_trainer)
"""``eval_step`` of a defense's class, whatever the class is called: the one whose signature fits."""
