"""The scores of :mod:`bdfast.attacks.kl_scores` once more, by the loop that one writes first, to compare."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdfast.attacks.kl_scores import KLScoreConfig
from bdfast.data.source import Source, to_floats
from bdfast.nn import normalized
from bdfast.ops import masked_random_start, patch_centers
from bdfast.runtime.determinism import stream_seed
from bdfast.runtime.guard import model_device
from bdfast.runtime.outputs import logits_of
from bdfast.runtime.score_table import ScoreTable

BATCH = 64


@dataclass(frozen=True)
class Parity:
    """How two sets of scores of the same samples agree.

    Attributes:
        samples: how many were compared.
        overlap: share of the ``top`` largest scores of either that are among those of the other.
        top: how many that is.
        max_difference: of two scores of one sample, in nats.
        rank_correlation: Spearman's.
    """

    samples: int
    overlap: float
    top: int
    max_difference: float
    rank_correlation: float


def kl_parity(
    model: nn.Module,
    data: object,
    table: ScoreTable,
    config: KLScoreConfig,
    *,
    samples: int = 256,
    share: float = 0.05,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Parity:
    """Score some samples of a table again with :func:`plain_scores`, and compare.

    Args:
        model, data, config, normalize: what the table was made of.
        table: of :func:`bdfast.attacks.kl_scores`.
        samples: how many to draw, from ``config.seed``.
        share: of them, from the top, whose identity matters.

    Example:
        >>> import bdfast
        >>> data, _, _ = bdfast.data.load("digits", limit=(20, 1))
        >>> model = bdfast.models.build("digits_cnn", num_classes=10, image_size=8, seed=0)
        >>> config = KLScoreConfig(steps=2)
        >>> kl_parity(model, data, bdfast.attacks.kl_scores(model, data, config), config).max_difference < 1e-6
        True
    """
    generator = torch.Generator().manual_seed(stream_seed(config.seed, "kl_parity"))
    rows = torch.randperm(len(table), generator=generator)[:samples].sort().values
    source = Source("kl_parity", data, "data")
    found = table.scores[rows]
    again = plain_scores(model, source, table.ids[rows], config, normalize)
    return compare(found, again, max(1, math.ceil(share * len(rows))))


def compare(
    found: Tensor,  # [N]
    expected: Tensor,  # [N]
    top: int,
) -> Parity:
    """Two sets of scores; what is NaN in one counts as the least.

    Example:
        >>> compare(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 3.0]), 1).overlap
        0.0
    """
    pair = [x.nan_to_num(-1.0) for x in (found, expected)]
    sets = [set(x.sort(descending=True, stable=True).indices[:top].tolist()) for x in pair]
    ranks = torch.stack([x.argsort().argsort().double() for x in pair])
    correlation = float(torch.corrcoef(ranks)[0, 1]) if len(found) > 1 else 1.0
    difference = float((pair[0] - pair[1]).abs().max())
    return Parity(len(found), len(sets[0] & sets[1]) / top, top, difference, correlation)


def plain_scores(
    model: nn.Module,
    source: Source,
    ids: Tensor,  # [M]
    config: KLScoreConfig,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    batch_size: int = BATCH,
) -> Tensor:
    """Scores ``[M]`` in float32 by plain PyTorch: eval mode, autograd to the input, tensors of masks.

    Patches and starts are those of the ops' references, so that the two differ in arithmetic alone.
    """
    network = copy.deepcopy(model).eval().requires_grad_(False)
    network = network if normalize is None else normalized(network, *normalize).to(model_device(model))
    place = torch.zeros(0, dtype=torch.float32, device=model_device(model))
    scores = []
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        images, labels = source.read(part)
        x, y = to_floats(images, place), labels.to(place.device)
        rounds = range(config.round * config.patches, (config.round + 1) * config.patches)
        each = torch.stack([_plain_batch(network, x, y, part.to(place.device), config, number) for number in rounds])
        how = {"mean": each.mean(0), "median": each.quantile(0.5, dim=0), "min": each.amin(0)}
        scores.append(how[config.combine].cpu())
    return torch.cat(scores)


def _plain_batch(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    ids: Tensor,
    config: KLScoreConfig,
    round: int,
) -> Tensor:
    with torch.no_grad():
        clean = logits_of("plain_scores", network(x), len(x)).double().log_softmax(1)
    height, width = x.shape[2:]
    radius = config.radius_of(height, width)
    options = {"seed": config.seed, "round": round, "backend": "reference"}
    centers = patch_centers(ids, height, width, **options)  # type: ignore[arg-type]
    mask = _mask(centers, radius, height, width).to(x.dtype)
    x_adv = masked_random_start(x, ids, centers, radius, eps=config.eps, **options)  # type: ignore[arg-type]
    for _ in range(config.steps):
        x_adv = x_adv.detach().requires_grad_(True)
        logits = logits_of("plain_scores", network(x_adv), len(x))
        if config.objective == "kl":
            loss = F.kl_div(logits.log_softmax(1), clean.float(), reduction="sum", log_target=True)
        else:
            loss = F.cross_entropy(logits, labels, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x_adv)
        moved = (x_adv.detach() + config.step_size * grad.sign() - x).clamp(-config.eps, config.eps)
        x_adv = (x + mask * moved).clamp(0, 1)
    with torch.no_grad():
        final = logits_of("plain_scores", network(x_adv), len(x)).double().log_softmax(1)
        # In float64: where the two agree to seven digits the terms, of either sign, leave only rounding in float32.
        return F.kl_div(final, clean, reduction="none", log_target=True).sum(1).clamp_min(0).float()


def _mask(
    centers: Tensor,  # [N, 2]
    radius: int,
    height: int,
    width: int,
) -> Tensor:  # [N, 1, H, W]
    rows = (torch.arange(height, device=centers.device)[None] - centers[:, :1]).abs() <= radius
    columns = (torch.arange(width, device=centers.device)[None] - centers[:, 1:]).abs() <= radius
    return (rows[:, :, None] & columns[:, None, :])[:, None]
