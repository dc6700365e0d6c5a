r"""Which samples PAD-FT trusts, and which it suspects.

The paper takes the k samples of lowest loss in every class. Poisoned samples often are those: of the target class's 30
lowest ones, 3 to 17 % were clean on digits. ``split="spread"`` asks another question first. Samples that were
relabelled to one class come from all others, and together with its own they scatter more widely than one class does.
Hence, with :math:`v_c` the variance (sum over features) of class c,

1. a class stands out where :math:`v_c \ge r \cdot \mathrm{median}_c\, v_c`;
2. in it, a mixture of two spherical normal distributions finds two modes;
3. the looser mode is suspected, and the one of lower loss; where these differ, whichever stands out more;
4. the suspicion is dropped unless the losses of the modes differ clearly, or differ and the suspects' second classes,
   which are often their true ones, are various: a class of two styles, such as the digit 1, passes no such test;
5. the k samples come from the other mode.

On digits (BadNets, Blended) 91 to 97 % of the suspects were poisoned and 97 to 100 % of the target class's selection
was clean (benchmarks/results/pad_ft_digits.md); on 4,000 images of CIFAR-10, 94 to 100 % and 42 to 86 %
(pad_ft_cifar10_subset.md beside it). No label of poison is used, but the thresholds were chosen on these two. The split
cannot see poison that the network hardly tells from the class, as WaNet's on CIFAR-10, nor, reliably, that of
clean-label attacks, which is of the class it is labelled as, nor all-to-all ones, under which no class stands out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bdfast.defenses.pad_ft.scores import Scores
from bdfast.ops import smallest_per_class

MIN_CLASS = 16  # samples: two modes of fewer are guesswork
SPREAD_WEIGHT = 4.0  # deviations of loss that weigh as much as a variance e times the other's
# Poison's variance was 1.8 to 5 times the rest's on digits, where WaNet's loss was higher, and 0.6 and 1.0 times on a
# CIFAR-10 net of 50 %, with losses lower by 1.7 and 7 deviations.
ITERATIONS = 200


@dataclass(frozen=True)
class Selection:
    """Outcome of step 1.

    Attributes:
        selected: int64, trusted samples, ordered by (class, margin, index).
        suspects: int64, sorted.
        spread: variance of each class in units of the median class; NaN where unknown. Empty without a split.
        split: a record for each class that was split: ``class``, ``samples``, ``suspects``, ``variance`` of the
            suspected and of the trusted mode (same unit), ``margin`` of both (means).
    """

    selected: Tensor
    suspects: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    spread: list[float] = field(default_factory=list)
    split: list[dict[str, Any]] = field(default_factory=list)


def select(
    scores: Scores,
    num_classes: int,
    *,
    k: int,
    trim: float,
    ratio: float | None,
    gap: float = 0.0,
    clear_gap: float = math.inf,
    diversity: float = 0.0,
) -> Selection:
    """The k cleanest samples of each class, of its trusted mode where it has two.

    Args:
        scores: of the whole set.
        num_classes: K.
        k: samples a class, at most.
        trim: share of each class that is passed over, lowest loss first.
        ratio: r, from which a class may be split; None never splits.
        gap: between the mean margins of its modes, from which it is; in units of the median class's deviation.
        clear_gap: the same, from which their second classes are not asked.
        diversity: of the suspects' second classes, from which it is: entropy in units of log(K - 1).
    """
    margins = scores.margins.clone()
    suspects, spread, split = torch.empty(0, dtype=torch.int64), [], []
    if ratio is not None:
        spread = class_spread(scores, num_classes)
        deviation = _margin_deviation(scores, num_classes)
        for c in (c for c in range(num_classes) if spread[c] >= ratio):
            index = _finite_of(scores, c)
            loose, record = split_class(scores.sketch[index], scores.margins[index], deviation)
            apart = abs(record["margin"][0] - record["margin"][1])
            various = _entropy(scores.runner_up[index[loose]]) >= diversity * math.log(max(num_classes - 1, 1))
            if not (apart >= gap * deviation and (various or apart >= clear_gap * deviation)):
                continue
            scale = spread[c] / record.pop("whole")
            record["variance"] = [round(v * scale, 4) for v in record["variance"]]
            split.append({"class": c, "samples": len(index), "suspects": int(loose.sum()), **record})
            suspects = torch.cat((suspects, index[loose]))
        margins[suspects] = float("inf")
    _trim_(margins, scores.labels, num_classes, trim)
    chosen = smallest_per_class(margins, scores.labels, k, num_classes)
    return Selection(chosen, suspects.sort().values, spread, split)


def class_spread(scores: Scores, num_classes: int) -> list[float]:
    """Variance of each class's features in units of the median class; NaN for fewer than 16 finite samples.

    Example:
        >>> sketch = torch.tensor([[-1.0], [1.0]] * 16 + [[-3.0], [3.0]] * 8)
        >>> labels = torch.arange(3).repeat_interleave(16)
        >>> class_spread(Scores(torch.zeros(48), labels, labels.int(), sketch), 3)
        [1.0, 1.0, 9.0]
    """
    classes = [_finite_of(scores, c) for c in range(num_classes)]
    known = {c: _variance(scores.sketch[i].double()) for c, i in enumerate(classes) if len(i) >= MIN_CLASS}
    median = float(torch.tensor(list(known.values()), dtype=torch.float32).median()) if known else math.nan
    return [known[c] / median if c in known and median > 0 else math.nan for c in range(num_classes)]


def split_class(
    features: Tensor,  # [n, d], finite
    margins: Tensor,  # [n], finite
    deviation: float,
) -> tuple[Tensor, dict[str, Any]]:
    """Which samples of a class are suspected, bool ``[n]``, and what the two modes are like.

    ``deviation`` is the unit of margins.

    Expectation maximisation for two spherical normal distributions, from the sign of the first principal component.
    """
    f = features.double()
    f = f - f.mean(0)
    d = f.shape[1]
    axis = torch.linalg.eigh(f.T @ f).eigenvectors[:, -1]
    share = torch.nn.functional.one_hot((f @ axis > 0).long(), 2).double()  # [n, 2] responsibilities
    for _ in range(ITERATIONS):
        weight = share.sum(0).clamp_min(1e-12)
        mean = (share.T @ f) / weight[:, None]
        distance = torch.cdist(f, mean).square()
        variance = ((share * distance).sum(0) / (weight * d)).clamp_min(1e-300)
        before = share
        share = (weight.log() - 0.5 * d * variance.log() - 0.5 * distance / variance).softmax(1)
        if bool((share - before).abs().max() < 1e-6):
            break
    mode = share.argmax(1)
    level = [float(margins[mode == j].double().mean()) if bool((mode == j).any()) else math.inf for j in (0, 1)]
    spread = [_variance(f[mode == j]) for j in (0, 1)]
    odd = [
        SPREAD_WEIGHT * math.log(max(v, 1e-300)) - m / max(deviation, 1e-300)
        for v, m in zip(spread, level, strict=True)
    ]
    suspected = int(odd[1] > odd[0])
    order = (suspected, 1 - suspected)
    record = {
        "variance": [spread[j] for j in order],
        "margin": [round(level[j], 4) for j in order],
        "whole": _variance(f),
    }
    return mode == suspected, record


def purity(selected: Tensor, labels: Tensor, is_poisoned: Tensor, num_classes: int) -> dict[str, float]:
    """Share of clean samples in the selection: ``"total"`` and by class; NaN where nothing was selected.

    Example:
        >>> purity(torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 0]).bool(), 2)
        {'total': 0.6666666865348816, '0': 0.5, '1': 1.0}
    """
    clean, given = (~is_poisoned[selected]).float(), labels[selected]
    groups = {"total": clean, **{str(c): clean[given == c] for c in range(num_classes)}}
    return {name: float(group.mean()) if len(group) else math.nan for name, group in groups.items()}


def _entropy(classes: Tensor) -> float:
    """Entropy of how often each class occurs, nats."""
    p = torch.bincount(classes.long()).double() / max(len(classes), 1)
    return float(torch.special.entr(p).sum())


def _margin_deviation(scores: Scores, num_classes: int) -> float:
    """Standard deviation of a class's margins, for the median class."""
    margins = [scores.margins[_finite_of(scores, c)].double() for c in range(num_classes)]
    known = [float(m.std(correction=0)) for m in margins if len(m) >= MIN_CLASS]
    return float(torch.tensor(known, dtype=torch.float32).median()) if known else math.nan


def _finite_of(scores: Scores, c: int) -> Tensor:
    finite = scores.margins.isfinite() & scores.sketch.isfinite().all(1)
    return ((scores.labels == c) & finite).nonzero().flatten()


def _variance(f: Tensor) -> float:
    return float((f - f.mean(0)).square().sum(1).mean()) if len(f) else 0.0


def _trim_(margins: Tensor, labels: Tensor, num_classes: int, trim: float) -> None:
    """Put the lowest ``trim`` of every class out of reach."""
    if trim == 0:
        return
    for c in range(num_classes):
        index = ((labels == c) & (margins < float("inf"))).nonzero().flatten()
        lowest = margins[index].argsort(stable=True)[: int(trim * len(index))]
        margins[index[lowest]] = float("inf")
