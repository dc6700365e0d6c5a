r"""Did calibration imprint a class? The check that goes with every calibrated set.

Images are pushed to where a backdoored victim is confident; for the target class, that may be the trigger. Purifying
with triggered images of another class would teach the backdoor anew. For every class c, over images of *other* classes:

1. drift: the rate at which they are taken for c must not rise by more than a tolerance;
2. transfer: the rate at which they are taken for c once they wear the perturbation :math:`g(x_j) - x_j` of a random
   image j of class c. A perturbation that carries a class with it, such as a trigger, shows as one column that stands
   out. It is reported, not judged: natural features transfer too.

The check is ours; the paper's summaries do not speak of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdfast.defenses.gic.guide import Guide
from bdfast.runtime.determinism import stream_seed


@dataclass(frozen=True)
class ImprintReport:
    """Rates by class c, over images of other classes; NaN where there are none.

    Attributes:
        before: taken for c, as they came.
        after: taken for c, calibrated.
        transfer: taken for c with the perturbation of a random image of class c.
        tolerance: how far ``after`` may be above ``before``.
        accuracy: fractions taken for their own class, before and after.
        loss: mean cross entropy of the images with a finite one, nats, before and after.
    """

    before: list[float]
    after: list[float]
    transfer: list[float]
    tolerance: float
    accuracy: tuple[float, float]
    loss: tuple[float, float]

    @property
    def drift(self) -> float:
        """Largest rise of a class, 0 if none rose."""
        return max([0.0, *(b - a for a, b in zip(self.before, self.after, strict=True) if b == b)])

    @property
    def drifted(self) -> list[int]:
        """Classes that rose by more than the tolerance."""
        pairs = enumerate(zip(self.before, self.after, strict=True))
        return [c for c, (before, after) in pairs if after - before > self.tolerance]

    @property
    def strongest(self) -> int:
        """The class whose perturbations transfer best."""
        return max(range(len(self.transfer)), key=lambda c: (self.transfer[c] == self.transfer[c], self.transfer[c]))


@torch.no_grad()
def check_imprint(
    guide: Guide,
    originals: Tensor,  # [N, C, H, W] float in [0, 1]
    calibrated: Tensor,  # [N, C, H, W] float in [0, 1]
    labels: Tensor,  # [N] int64
    num_classes: int,
    *,
    tolerance: float,
    seed: int,
    batch_size: int,
) -> ImprintReport:
    """Ask the victim about every image three times: as it was, calibrated, and with another's perturbation."""
    labels = labels.cpu()
    partner = _partners(labels, seed)
    seen: dict[str, list[Tensor]] = {"before": [], "after": [], "transfer": []}
    losses: dict[str, list[Tensor]] = {"before": [], "after": []}
    for start in range(0, len(labels), batch_size):
        place = slice(start, start + batch_size)
        worn = calibrated[partner[place]] - originals[partner[place]]
        views = {
            "before": originals[place],
            "after": calibrated[place],
            "transfer": (originals[place] + worn).clamp(0, 1),
        }
        for name, x in views.items():
            logits = guide.logits(x.to(guide.device)).cpu()
            seen[name].append(logits.argmax(1))
            if name in losses:
                losses[name].append(torch.nn.functional.cross_entropy(logits, labels[place], reduction="none"))
    classes = {name: torch.cat(parts) for name, parts in seen.items()}
    carried = labels[partner]
    accuracy = [float((classes[name] == labels).float().mean()) for name in losses]
    loss = [_finite_mean(torch.cat(parts)) for parts in losses.values()]
    return ImprintReport(
        _rates(classes["before"], labels != torch.arange(num_classes)[:, None]),
        _rates(classes["after"], labels != torch.arange(num_classes)[:, None]),
        _rates(classes["transfer"], (carried == torch.arange(num_classes)[:, None]) & (labels != carried)),
        tolerance,
        (accuracy[0], accuracy[1]),
        (loss[0], loss[1]),
    )


def _partners(labels: Tensor, seed: int) -> Tensor:
    """For every image one of another class where there is one, drawn at random."""
    generator = torch.Generator().manual_seed(stream_seed(seed, "gic imprint"))
    partner = torch.empty_like(labels)
    for c in sorted(set(labels.tolist())):
        rows, others = (labels == c).nonzero().flatten(), (labels != c).nonzero().flatten()
        pool = others if len(others) else rows
        partner[rows] = pool[torch.randint(len(pool), (len(rows),), generator=generator)]
    return partner


def _rates(
    classes: Tensor,  # [N]
    counted: Tensor,  # [K, N] bool
) -> list[float]:
    """Of the images that count for class c, the share taken for c."""
    hits = (classes == torch.arange(len(counted))[:, None]) & counted
    return [float(h) / float(n) if n else float("nan") for h, n in zip(hits.sum(1), counted.sum(1), strict=True)]


def _finite_mean(losses: Tensor) -> float:
    finite = losses[losses.isfinite()]
    return float(finite.mean()) if len(finite) else float("nan")
