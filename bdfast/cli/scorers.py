"""The scores of ``bdfast score``: one entry each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from bdfast.attacks import KLScoreConfig, Parity, kl_parity, kl_scores
from bdfast.defenses import PadFTConfig, sce_scores


@dataclass(frozen=True)
class Scorer:
    """A number for every sample of a training set.

    Attributes:
        name: as typed.
        function: ``function(model, data, config, callback=, normalize=, checkpoint=, distributed=)`` to a
            :class:`bdfast.runtime.ScoreTable`.
        config: its frozen dataclass of options.
        summary: one line.
        label: what the score is, with its unit, for an axis.
        suspicious: which end of the scores is.
        parity: ``parity(model, data, table, config, samples=, normalize=)``, the check of ``--verify``; None without.
    """

    name: str
    function: Callable[..., Any]
    config: type
    summary: str
    label: str
    suspicious: Literal["small", "large"]
    parity: Callable[..., Parity] | None = None


SCORERS: tuple[Scorer, ...] = (
    Scorer(
        "advrbd",
        kl_scores,
        KLScoreConfig,
        "how far a patch-limited perturbation moves each prediction (arXiv 2405.12719): small is suspicious",
        "KL divergence, nats",
        "small",
        kl_parity,
    ),
    Scorer(
        "sce",
        sce_scores,
        PadFTConfig,
        "how easily each label is fitted (arXiv 2409.12072), and which samples PAD-FT would select",
        "SCE margin, nats",
        "small",
    ),
)
