"""On a network that was really trained, the usual float32 formulas tie confident samples; margins do not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast import ops
from tests.defenses.conftest import Victim


@pytest.fixture
def logits(victim: Victim) -> tuple[Tensor, Tensor]:
    """Of the images that the network was trained on, with the trigger added to some."""
    images, attack_labels, *_ = victim.triggered
    images = torch.cat([victim.train[0], images])
    with torch.no_grad():
        return victim.model(images.float() / 255), torch.cat([victim.train[1], attack_labels])


def from_probabilities(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy as -log softmax, in two steps."""
    return -F.softmax(logits, 1).gather(1, target[:, None]).squeeze(1).log()


def from_logsumexp(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy as logsumexp - z_y."""
    return torch.logsumexp(logits, 1) - logits.gather(1, target[:, None]).squeeze(1)


def symmetric(logits: Tensor, target: Tensor) -> Tensor:
    """SCE(0.1, 1) with the clamps of its authors."""
    p = F.softmax(logits, 1).clamp(1e-7, 1.0)
    q = F.one_hot(target, logits.shape[1]).float().clamp(1e-4, 1.0)
    return 0.1 * F.cross_entropy(logits, target, reduction="none") - (p * q.log()).sum(1)


def tied(values: Tensor) -> int:
    """How many share their value with another."""
    _, counts = values.unique(return_counts=True)
    return int(counts[counts > 1].sum())


@pytest.mark.parametrize(("usual", "least"), [(from_probabilities, 20), (from_logsumexp, 100), (symmetric, 5)])
def test_margins_order_what_the_usual_losses_tie(logits: tuple[Tensor, Tensor], usual: object, least: int) -> None:
    rows = logits[0].unique(dim=0)
    assert len(rows) == len(logits[0])  # no two images have the same logits: every tie is one of rounding
    loss = usual(*logits)  # type: ignore[operator]
    margin = ops.sce_margin(*logits)
    assert tied(loss) >= least
    assert tied(margin) < 5  # two of so many float32 numbers may be the same by chance
    exact = from_logsumexp(logits[0].double(), logits[1])
    ordered = exact[margin.argsort()]
    assert (ordered.diff() >= -1e-5 * ordered[1:] - 1e-13).all()  # fp64 has a last digit, too


def test_clamp_is_the_usual_formula_bit_for_bit(logits: tuple[Tensor, Tensor]) -> None:
    ours = ops.sce_loss(*logits, alpha=0.1, beta=1.0, log_zero=math.log(1e-4), clamp=1e-7)
    assert torch.equal(ours, symmetric(*logits))
