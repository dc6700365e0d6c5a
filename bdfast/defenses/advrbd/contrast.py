r"""Contrast [O]: what do suspected samples have that presumed clean ones of their class lack?

Most suspects are clean: enhancement leaves easy samples, and whole classes, as they are labelled. What tells the poison
among them is that it shares something, the trigger, which nothing that is presumed clean has; clean suspects and
presumed clean samples of a class differ in little. So a network learns to tell the two sides apart by the logit of a
sample's own label, :math:`z_y(x)`, in

.. math::

    L = \frac{2}{1 + w} \Bigl( \frac{1}{|B_u|} \sum_{i \in B_u} \log(1 + e^{-z_{y_i}(x_i)})
        + \frac{w}{|B_c|} \sum_{i \in B_c} \log(1 + e^{z_{y_i}(x_i)}) \Bigr),

whose minimum is the log density ratio :math:`\log p_u(x, y) - \log p_c(x, y) - \log w` (logistic regression on cases
and controls). A sample that either side may have gets about :math:`-\log w`; poison, of which the presumed clean side
has next to nothing, gets much more, whatever w is. It starts from the warm-up network, which knows the trigger.

A network that was trained on a sample as a suspect would know it by heart. The suspects are dealt into two halves, and
each half is judged by the network that was trained on the other: a trigger is the same in both, what is particular to a
sample is not. Several deals are averaged, and suspects below 0 are clean after all.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bdfast.defenses.advrbd.config import AdvrBDConfig
from bdfast.defenses.advrbd.pairs import PairTraining
from bdfast.runtime.determinism import stream_seed


def contrast(config: AdvrBDConfig, name: str) -> PairTraining:
    """Epochs over the presumed clean side, of one half of the suspects beside it.

    Records tell ``accuracy``: the mean of the shares of the two sides that are on their own side of 0.
    """
    return PairTraining(
        name, partial(_objective, config.look_weight), ("accuracy",), "presumed",
        config.look_epochs, config.look_lr, annealed=True,
    )  # fmt: skip


def _objective(weight: float, logits: Tensor, labels: Tensor, suspected: int) -> tuple[Tensor, ...]:
    z = own_logits(logits, labels)
    loss = 2 / (1 + weight) * (softplus(-z[:suspected]).mean() + weight * softplus(z[suspected:]).mean())
    with torch.no_grad():
        told = ((z[:suspected] > 0).double().mean() + (z[suspected:] < 0).double().mean()) / 2
    return loss, told


def own_logits(
    logits: Tensor,  # [N, K]
    labels: Tensor,  # [N]
) -> Tensor:
    """The logit of every sample's own label.

    Example:
        >>> own_logits(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0])).tolist()
        [2.0, 3.0]
    """
    return logits.gather(1, labels[:, None]).squeeze(1)


def halves(
    suspected: Tensor,  # [N] bool
    seed: int,
    look: int,
) -> tuple[Tensor, Tensor]:
    """The suspects dealt at random into two halves, as masks.

    Example:
        >>> one, other = halves(torch.tensor([True, False, True, True]), seed=0, look=0)
        >>> (one | other).tolist(), bool((one & other).any()), int(one.sum())
        ([True, False, True, True], False, 2)
    """
    index = suspected.nonzero().flatten()
    generator = torch.Generator().manual_seed(stream_seed(seed, f"advrbd: deal of look {look}") % 2**63)
    one = torch.zeros_like(suspected)
    one[index[torch.randperm(len(index), generator=generator)[: (len(index) + 1) // 2]]] = True
    return one, suspected & ~one
