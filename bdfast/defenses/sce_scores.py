"""Step 1 of PAD-FT alone: the margin of every training sample, and which ones the defense would trust."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from bdfast.defenses.pad_ft.config import PadFTConfig
from bdfast.defenses.pad_ft.run import open_run
from bdfast.defenses.pad_ft.scores import Caller
from bdfast.defenses.pad_ft.selection import select
from bdfast.errors import message
from bdfast.files import check_path
from bdfast.runtime.progress import Callback, check_callback
from bdfast.runtime.ranks import Ranks
from bdfast.runtime.score_table import ScoreTable
from bdfast.training.workspace import Normalization

CALLER = Caller("sce_scores", "data", "checkpoint")


def sce_scores(
    model: nn.Module,
    data: object,
    config: PadFTConfig = PadFTConfig(),  # noqa: B008  (frozen)
    *,
    normalize: Normalization | None = None,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    distributed: bool = False,
) -> ScoreTable:
    """The SCE margin of every sample (:func:`bdfast.ops.sce_margin`): within a class, the smaller, the easier to fit.

    The order within a class is that of symmetric cross entropy with any positive weights, without its float32 ties.
    Samples of a backdoor are among the easiest to fit of their class: small is not clean.

    Args:
        model: the victim, as :func:`bdfast.defenses.pad_ft` takes it.
        data: the training set: a tuple ``(images, labels)``, a map-style Dataset, a DataLoader over one or a
            :class:`bdfast.attacks.PoisonedData`.
        config: of PAD-FT; of it ``k``, ``trim``, ``split`` and what belongs to them choose who is selected.
        normalize: ``(mean, std)`` of a model that does not normalise its own input.
        device: where to work; None is where the model is.
        checkpoint: a folder that keeps margins in chunks, from which a run that was killed goes on; one of another run
            is refused.
        callback: called after every chunk with ``epoch`` and ``epochs``: samples done by this process, and all.
        distributed: share the work with the other processes of ``torch.distributed``; all get the whole table.

    Returns:
        A :class:`bdfast.runtime.ScoreTable` in index order with the columns ``label``, ``selected`` (among the k of its
        class that PAD-FT would trust) and ``suspect`` (held to be poisoned, with split="spread"). A sample with logits
        that are not finite is in quarantine: its score is NaN, and it is never selected.

    Raises:
        TypeError, ValueError, LabelRangeError: as :func:`bdfast.defenses.pad_ft`.

    Example:
        >>> import bdfast
        >>> (images, labels), _, _ = bdfast.data.load("digits", limit=(100, 1))
        >>> model = bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1, seed=0)
        >>> table = sce_scores(model, (images, labels), PadFTConfig(k=3))
        >>> len(table), int(table.columns["selected"].sum())
        (100, 30)
    """
    if not isinstance(config, PadFTConfig):
        got = type(config).__name__
        raise TypeError(message("sce_scores", "config", "a PadFTConfig", got, "pass PadFTConfig(...)"))
    check_callback("sce_scores", callback)
    check_path("sce_scores", "checkpoint", checkpoint)
    ranks = Ranks.joined() if distributed else Ranks()
    with open_run(CALLER, model, data, config, normalize, device, None) as run:

        def finished(count: int) -> None:
            if callback is not None:
                callback({"epoch": count, "epochs": len(run.source)})

        scores = run.score(config, checkpoint, ranks=ranks, finished=finished)
        picked = select(
            scores,
            run.num_classes,
            k=config.k,
            trim=config.trim,
            ratio=config.spread_ratio if config.split == "spread" else None,
            gap=config.margin_gap,
            clear_gap=config.clear_gap,
            diversity=config.diversity,
        )
        margins = scores.margins.masked_fill(scores.margins == float("inf"), float("nan"))
        columns = {
            "label": scores.labels,
            "selected": _mask(picked.selected, len(margins)),
            "suspect": _mask(picked.suspects, len(margins)),
        }
        return ScoreTable(torch.arange(len(margins)), margins, columns)


def _mask(index: Tensor, count: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[index] = True
    return mask
