"""The scores of ``bdfast score``: one entry each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from bdfast.attacks import KLScoreConfig, Parity, kl_parity, kl_scores
from bdfast.defenses import PadFTConfig, sce_scores

# Of PadFTConfig: step 1, and how the rows of a forward pass are cut.
SELECTION = (
    *("preset", "k", "trim", "split", "spread_ratio", "margin_gap", "clear_gap", "diversity"),
    *("score_batch_size", "split_dims", "seed", "deterministic"),
)


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
        acts: the fields of ``config`` that scores and selection depend on; None is all.
    """

    name: str
    function: Callable[..., Any]
    config: type
    summary: str
    label: str
    suspicious: Literal["small", "large"]
    parity: Callable[..., Parity] | None = None
    acts: tuple[str, ...] | None = None

    @property
    def without(self) -> tuple[str, ...]:
        """Settings that would have no effect: no options of this score."""
        every = [item.name for item in fields(self.config)]
        rest = [] if self.acts is None else [name for name in every if name not in self.acts]
        return (*rest, *(() if self.parity else ("verify",)))


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
        acts=SELECTION,
    ),
)
