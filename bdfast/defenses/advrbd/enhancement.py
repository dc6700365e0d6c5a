r"""Enhancement: the network forgets what D_c has in common with the rest, and keeps what only the rest has.

.. math::

    L = \frac{1}{|B_u|} \sum_{i \in B_u} \mathrm{CE}_i
        - \mu \, \frac{1}{|B_c|} \sum_{i \in B_c} \min(\mathrm{CE}_i, \tau)

over batches of D_u and of D_c (eq. 4 of arXiv 2405.12719, whose ascent has no bound). If D_c is clean, what can satisfy
both terms is a feature that D_u alone carries: the trigger. A few poisoned samples in D_c unlearn the trigger too: 5
among 280, of 140 in all, left 6 % of a BadNets poison to be found on digits. The loss is
:func:`bdfast.ops.bounded_ascent_cross_entropy`.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bdfast.defenses.advrbd.config import AdvrBDConfig
from bdfast.defenses.advrbd.pairs import PairTraining
from bdfast.ops import bounded_ascent_cross_entropy


def enhancement(config: AdvrBDConfig, number: int, num_classes: int) -> PairTraining:
    """E1 epochs over D_u, the ``number``-th enhancement of the run.

    Records tell ``accuracy`` (on D_u, as met in training) and ``dc_loss`` (mean of the bounded cross entropies of D_c).
    """
    tau = 2 * math.log(num_classes) if config.tau is None else config.tau
    return PairTraining(
        f"enhancement {number}", partial(_objective, config.mu, tau), ("accuracy", "dc_loss"), "suspected",
        config.enhance_epochs, config.enhance_lr, annealed=False,
    )  # fmt: skip


def _objective(mu: float, tau: float, logits: Tensor, labels: Tensor, suspected: int) -> tuple[Tensor, ...]:
    loss = bounded_ascent_cross_entropy(logits, labels, suspected, mu=mu, tau=tau)
    with torch.no_grad():
        right = (logits[:suspected].argmax(1) == labels[:suspected]).double().mean()
        ascent = cross_entropy(logits[suspected:], labels[suspected:], reduction="none").clamp_max(tau).mean()
    return loss, right, ascent
