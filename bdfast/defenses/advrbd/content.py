r"""Does a sample belong to the class that it is labelled as? Asked of a network that never saw that class.

A poisoned sample looks like its true class and is labelled as the target. Every network that was trained on it knows
the trigger, and tells little: on digits the KL score of AdvrBD ranked WaNet's and TaCT's poison *above* clean samples
of the target class. A network that was trained without class c cannot know a trigger whose label is c, since all
samples that carry both are left out. In its features, samples of c are new and form a group of their own, while poison
lies with its true classes. For every class c,

1. train a network on all samples but those labelled c, with random patches of the images erased, so that a small
   trigger is one more patch;
2. the *seeds* of c are a share q of its samples: those that this network knows least, of lowest energy
   :math:`\mathrm{logsumexp}_{j \ne c}\, z_j`, and that most often have their own label among their k nearest
   neighbours (cosine of the whitened features), k half a class, by the sum of their two ranks: samples of c are new and
   crowd together, while poison is known and lies among the many samples of its true classes;
3. with the means :math:`m_j` of the other classes and :math:`m_c` of the seeds in its features h, standardised, and
   the pooled covariance S of the other classes, the content margin of a sample of c is the difference of two squared
   Mahalanobis distances (linear discriminant analysis):

.. math::

    s(x) = \tfrac12 \Bigl( \min_{j \ne c} \lVert h(x) - m_j \rVert_{S^{-1}}^2 - \lVert h(x) - m_c \rVert_{S^{-1}}^2
    \Bigr)

Above 0, x is more like the seeds of its class than like any other class. A trigger on images of the target class itself
(some attacks poison those too) leaves the content right: such samples may pass, and so does clean-label poison.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

RIDGE = 1e-6  # of the standard deviations, for features that never vary

NEIGHBORS = 0.5  # of the mean size of a class; poison of one true class alone is to be outnumbered by that class

Seeding: TypeAlias = Literal["both", "energy", "neighbors"]

LEAST_RECOGNISED = 0.5
"""Share of the samples with a margin above 0 below which content rejects nothing. It is 0.77 to 0.93 on digits
(benchmarks/results/advrbd_digits.md); on 4,000 images of CIFAR-10 (advrbd_cifar10_subset.md beside it), of which the
network classifies half right, it is 0.36 to 0.40, and most of the clean samples would be rejected."""


class ContentView(NamedTuple):
    """What a network that never saw some classes makes of the whole set."""

    features: Tensor  # [N, D]
    logits: Tensor  # [N, K]


def dealt(num_classes: int, networks: int) -> list[list[int]]:
    """Which classes each network leaves out: every class once, at most ``networks`` groups.

    Example:
        >>> dealt(3, 10), dealt(5, 2)
        ([[0], [1], [2]], [[0, 2, 4], [1, 3]])
    """
    count = min(networks, num_classes)
    return [list(range(first, num_classes, count)) for first in range(count)]


def content_margins(
    view: ContentView,
    labels: Tensor,  # [N]
    left_out: list[int],
    *,
    seeds: float,
    shrinkage: float,
    seeding: Seeding = "both",
) -> Tensor:
    """Content margin of the samples of the classes that the network was not trained on; NaN for all others.

    Samples whose features or logits are not finite get NaN too, and take no part.

    Args:
        view: of the whole set.
        labels: as given.
        left_out: classes.
        seeds: q in (0, 1], at least one sample a class.
        shrinkage: of S towards a multiple of the identity.
        seeding: what makes a sample a seed: energy, neighbours, or both.

    Returns:
        float32 ``[N]``, on the device of the features.
    """
    labels = labels.to(view.features.device)
    margins = torch.full(labels.shape, float("nan"), dtype=torch.float32, device=labels.device)
    finite = view.features.isfinite().all(1) & view.logits.isfinite().all(1)
    groups = {int(c): (finite & (labels == c)).nonzero().flatten() for c in torch.unique(labels)}
    groups = {c: index for c, index in groups.items() if len(index)}
    features = _standardised(view.features, finite)
    known = [c for c in groups if c not in left_out]
    if not known:
        return margins
    means = torch.stack([features[groups[c]].mean(0) for c in groups])
    position = {c: i for i, c in enumerate(groups)}
    within = torch.cat([features[groups[c]] - means[position[c]] for c in known])
    whiten = _whitening(within, shrinkage)
    white = features @ whiten
    energy = view.logits[:, known].double().logsumexp(1)
    count = max(1, round(NEIGHBORS * int(finite.sum()) / len(groups)))
    for c in (c for c in left_out if c in groups):
        index = groups[c]
        new = torch.zeros(len(index), dtype=torch.int64, device=index.device)
        if seeding != "neighbors":
            new += _place(-energy[index])
        if seeding != "energy":
            new += _place(_alike(white, labels, index, finite.nonzero().flatten(), count))
        chosen = index[new.argsort(descending=True, stable=True)[: max(1, int(seeds * len(index)))]]
        own = features[chosen].mean(0)
        others = means[[i for other, i in position.items() if other != c]]
        if len(others) == 0:
            continue
        x = white[index]
        nearest = torch.cdist(x, others @ whiten).square().min(1).values
        distance = (x - own @ whiten).square().sum(1)
        margins[index] = (0.5 * (nearest - distance)).float()
    return margins


def recognised(
    margins: Tensor,  # [N]
) -> float:
    """Share of the samples that look like their class: how much content can tell, since most of any set is clean.

    Example:
        >>> recognised(torch.tensor([2.0, 1.0, -1.0, float("nan")]))
        0.5
    """
    return float((margins > 0).double().mean())


def tells_classes(
    margins: Tensor,  # [N]
) -> bool:
    """Whether content recognises enough samples to reject some.

    Warns:
        UserWarning: it recognises fewer than :data:`LEAST_RECOGNISED`.
    """
    share = recognised(margins)
    if share < LEAST_RECOGNISED:
        text = (
            f"advrbd: networks that never saw a class recognise {100 * share:.0f} % of its samples, and content says "
            "little then: it only helps to rank, and poison that no ranking finds stays. Pass more data, a better "
            "network, more content_epochs or content_networks; or compare with preset='paper'"
        )
        warnings.warn(text, UserWarning, stacklevel=3)
    return share >= LEAST_RECOGNISED


def _standardised(features: Tensor, finite: Tensor) -> Tensor:
    f = features.double()
    known = f[finite]
    return (f - known.mean(0)) / (known.std(0) + RIDGE)


def _place(values: Tensor) -> Tensor:
    """How many places from the end each value is in descending order, where ties go by index."""
    places = torch.empty(len(values), dtype=torch.int64, device=values.device)
    places[values.argsort(descending=True, stable=True)] = torch.arange(len(values) - 1, -1, -1, device=values.device)
    return places


def _alike(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    index: Tensor,  # [M]
    among: Tensor,  # [A]
    count: int,
) -> Tensor:
    """Share of the same label among the nearest neighbours of the samples ``index``, themselves left out; ``[M]``."""
    directions = nn.functional.normalize(features, dim=1).float()
    everyone = directions[among].T
    shares = []
    for rows in torch.split(index, 256):
        closeness = directions[rows] @ everyone
        closeness[rows[:, None] == among] = -2.0
        nearest = among[closeness.topk(min(count, len(among) - 1), 1).indices]
        shares.append((labels[nearest] == labels[rows][:, None]).float().mean(1))
    return torch.cat(shares)


def _whitening(deviations: Tensor, shrinkage: float) -> Tensor:
    """W with W W^T the inverse of the shrunk covariance, ``[D, D]``."""
    covariance = deviations.T @ deviations / len(deviations)
    scale = covariance.diagonal().mean().clamp_min(RIDGE)
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    covariance = (1 - shrinkage) * covariance + (shrinkage * scale + RIDGE * scale) * eye
    values, vectors = torch.linalg.eigh(covariance)
    whitening: Tensor = vectors * values.clamp_min(RIDGE * float(scale)).rsqrt()
    return whitening


class RandomErasing(nn.Module):
    """A network that, in training, sees its images with a random rectangle replaced by a grey level or by noise.

    Three images in four lose up to half of each side. Draws come from the global generator of the images' device, which
    training isolates and from which a replayed step draws anew.

    Example:
        >>> net = RandomErasing(nn.Identity()).eval()
        >>> bool((net(torch.ones(2, 1, 4, 4)) == 1).all())
        True
    """

    def __init__(self, network: nn.Module, share: float = 0.75) -> None:
        super().__init__()
        self.network, self.erase = network, _Erase(share)

    def forward(
        self,
        images: Tensor,  # [N, C, H, W] in [0, 1]
    ) -> Tensor:
        output: Tensor = self.network(self.erase(images))
        return output


class _Erase(nn.Module):
    """Images with rectangles; a module, which is one node where a network is traced."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(
        self,
        images: Tensor,  # [N, C, H, W] in [0, 1]
    ) -> Tensor:
        if not self.training:
            return images
        (count, channels, height, width), device = images.shape, images.device
        rows = _span(count, height, device)[:, None, :, None]
        columns = _span(count, width, device)[:, None, None, :]
        uniform = partial(torch.rand, dtype=torch.float32, device=device)
        erased = rows & columns & (uniform(count, 1, 1, 1) < self.share)
        grey = uniform(count, channels, 1, 1).expand(images.shape)
        noise = uniform(images.shape)
        fill = torch.where(uniform(count, 1, 1, 1) < 0.5, grey, noise)
        return torch.where(erased, fill.to(images.dtype), images)


def _span(count: int, length: int, device: torch.device) -> Tensor:
    """Random intervals of up to half of ``length``, as a mask ``[count, length]``, cut at the ends."""
    extent = torch.randint(1, length // 2 + 2, (count, 1), device=device)
    center = torch.randint(0, length, (count, 1), device=device)
    return (torch.arange(length, device=device) - center).abs() * 2 < extent
