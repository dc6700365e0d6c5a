r"""PAD-FT: purify the poisoned training set, clip activations with what is left, fine-tune the classifier.

Wei et al., "PAD-FT: A Lightweight Defense for Backdoor Attacks via Data Purification and Fine-Tuning", 2024,
https://arxiv.org/abs/2409.12072. Nothing clean is assumed: the defender holds the poisoned training set and the victim.

1. Purification. In every class, keep the k samples of smallest symmetric cross entropy.
2. Activation clipping. Put an upper bound on every channel of some activation maps, and make the bounds as tight as the
   selected samples allow.
3. Classifier fine-tuning. Train the last linear layer on the selected samples, with symmetric cross entropy and the
   consistency of an image and its augmentation.

The preset ``paper`` is the closest reading of the paper. Backdoor samples are easy to fit, though, and crowd the lowest
losses of the target class. The preset ``robust`` departs from it in named fields: the target class is recognised by how
far its features scatter and split in two, the samples are taken from one part, and steps 2 and 3 unlearn the other.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bdfast.defenses.last_layer import LastLayer
from bdfast.defenses.pad_ft.bounds import fit_bounds, predict
from bdfast.defenses.pad_ft.config import PadFTConfig
from bdfast.defenses.pad_ft.head import fine_tune_head
from bdfast.defenses.pad_ft.run import open_run
from bdfast.defenses.pad_ft.scores import Caller, Scores
from bdfast.defenses.pad_ft.selection import Selection, purity, select
from bdfast.errors import message
from bdfast.files import check_path
from bdfast.runtime.plain_json import plain
from bdfast.runtime.progress import Callback, Record, check_callback
from bdfast.runtime.resident import ResidentData
from bdfast.training.results import TrainedResult
from bdfast.training.workspace import Normalization

CALLER = Caller("pad_ft", "poisoned_data", "scores_dir")
LOST_TOO_MUCH = 0.10  # fraction of the selected samples; clipping that costs more is worth a warning


@dataclass(frozen=True)
class PadFTResult(TrainedResult):
    """What :func:`pad_ft` returns.

    Attributes:
        model: PAD-FT, the network after step 3; :meth:`pad_model` is PAD, the one after step 2.
        history: a record an epoch of steps 2 and 3 (``stage`` "clip", then "tune"): ``epoch`` (counted through),
            ``epochs``, ``loss``, ``accuracy`` (on the selected set, as met in training), ``lr``, ``seconds``; of step 2
            also ``lam``, ``norm`` by site and, with keep="best", ``kept_accuracy``; of step 3 ``consistency``.
        timings: seconds a stage (``setup``, ``score``, ``select``, ``clip``, ``tune``).
        config: as it ran.
        selected: int64, indices of the trusted samples, ordered by (class, margin, index).
        scores: float32 ``[N]``, :func:`bdfast.ops.sce_margin` of every sample: smaller is cleaner; +Inf, not trusted.
        suspects: int64, indices of the samples held to be poisoned; empty with split="none".
        bounds: float32 ``[C]`` by site.
        short: classes of which fewer than k samples were there, with their number.
        spread: variance of each class's features in units of the median class (split="spread").
        split: a record for each class that was split; see :class:`bdfast.defenses.pad_ft.selection.Selection`.
        purity: share of clean samples among the selected, ``"total"`` and by class; None without ground truth.
        nonfinite: samples whose logits were not all finite.
    """

    config: PadFTConfig
    selected: Tensor = field(repr=False)
    scores: Tensor = field(repr=False)
    suspects: Tensor = field(repr=False)
    bounds: dict[str, Tensor] = field(repr=False)
    short: dict[int, int]
    spread: list[float] = field(repr=False)
    split: list[dict[str, Any]]
    purity: dict[str, float] | None
    nonfinite: int
    _layer: str = field(repr=False)
    _head: dict[str, Tensor] = field(repr=False)

    def pad_model(self) -> nn.Module:
        """PAD: a copy of the model with the last layer as it came, clipped but not fine-tuned."""
        model = copy.deepcopy(self.model)
        model.get_submodule(self._layer).load_state_dict(self._head)
        return model

    def to_json(self) -> str:
        """Everything but the weights and the scores, as one JSON object; numbers that are not finite become null."""
        tensors = {name: getattr(self, name).tolist() for name in ("selected", "suspects")}
        tensors["bounds"] = {name: z.tolist() for name, z in self.bounds.items()}
        hidden = ("model", "scores", "_layer", "_head", *tensors)
        values = {name: value for name, value in vars(self).items() if name not in hidden}
        return json.dumps(plain({**values, **tensors}), allow_nan=False)


def pad_ft(
    model: nn.Module,
    poisoned_data: object,
    config: PadFTConfig = PadFTConfig(),  # noqa: B008  (frozen)
    *,
    callback: Callback | None = None,
    normalize: Normalization | None = None,
    device: str | torch.device | None = None,
    ground_truth: Tensor | None = None,
    trusted: Tensor | None = None,
    scores_dir: str | os.PathLike[str] | None = None,
) -> PadFTResult:
    """Purify the training set, clip activations, fine-tune the last layer (arXiv 2409.12072).

    Args:
        model: the victim, from images ``[N, C, H, W]``, float in [0, 1], to logits ``[N, K]`` or an output with
            ``.logits``, which come straight from its last linear layer. It is left alone.
        poisoned_data: the training set: a tuple ``(images, labels)`` of tensors (uint8, or float in [0, 1]; int
            ``[N]``), a map-style Dataset or a DataLoader over one (of which no more than a chunk is in memory at a
            time), or a :class:`bdfast.attacks.PoisonedData`.
        config: see :class:`PadFTConfig`.
        callback: called with every epoch's record; what it raises ends the run.
        normalize: ``(mean, std)`` of a model that does not normalise its own input.
        device: where to work, and where the returned model is; None is where ``model`` is.
        ground_truth: bool ``[N]``, which samples are poisoned: for :attr:`PadFTResult.purity` alone. A PoisonedData
            brings its own.
        trusted: indices to use in place of the selection of step 1, of samples that are known to be clean, say; there
            are no suspects then.
        scores_dir: a folder that keeps the scores of step 1 in chunks; a run that was killed goes on from them, with
            the same bits. One of another run is refused.

    Returns:
        :class:`PadFTResult`. Model, train/eval mode, requires_grad flags, random state of the caller are as before.

    Warns:
        UserWarning: a class without a sample to trust; logits that are not finite; a selection that the model
            misclassifies whole; clipping that cost more than 10 points of accuracy on the selection.

    Raises:
        TypeError, ValueError: arguments of another kind than stated, weights that are not finite, nothing to trust.
        LabelRangeError: a label that is no class of the model.
        FloatingPointError: a loss, a bound or a weight was no longer finite at the end of an epoch.

    Example:
        >>> import bdfast
        >>> (images, labels), _, _ = bdfast.data.load("digits", limit=(200, 1))
        >>> model = bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1).eval()
        >>> result = pad_ft(model, (images, labels), PadFTConfig(k=5, keep="best", clip_epochs=2, epochs=1))
        >>> len(result.selected), [record["stage"] for record in result.history], len(result.bounds)
        (50, ['clip', 'clip', 'tune'], 3)
    """
    if not isinstance(config, PadFTConfig):
        raise TypeError(message("pad_ft", "config", "a PadFTConfig", type(config).__name__, "pass PadFTConfig(...)"))
    check_callback("pad_ft", callback)
    check_path("pad_ft", "scores_dir", scores_dir)
    with open_run(CALLER, model, poisoned_data, config, normalize, device, ground_truth) as run:
        # 1. D_c: of each class the k samples of smallest SCE, in the order of their margins, which is the same.
        with run.watch("score"):
            scores = run.score(config, scores_dir)
        with run.watch("select"):
            ratio = config.spread_ratio if config.split == "spread" else None
            if trusted is None:
                picked = select(
                    scores,
                    run.num_classes,
                    k=config.k,
                    trim=config.trim,
                    ratio=ratio,
                    gap=config.margin_gap,
                    clear_gap=config.clear_gap,
                    diversity=config.diversity,
                )
            else:
                picked = Selection(_check_indices(trusted, len(scores.labels)))
            short = _check_selection(picked.selected, scores, run.num_classes, config.k)
            samples = run.gather(picked.selected)
            suspects = run.suspects(picked.suspects, scores.labels, config)
        log = _Log(config.clip_epochs + config.epochs, callback)

        # 2. min over Z of E (f_Z - f)^2 + lambda sum ||z||, over what f itself gets right.
        with run.watch("clip"):
            clipped = run.clip(samples, config)
            for record in fit_bounds(clipped.fast, clipped.bounds, clipped.kept, clipped.logits, suspects, config):
                log(record, "clip")
            _warn_of_clipping(clipped.forward, clipped.kept, clipped.any_right, config)

        # 3. The last linear layer, in eval mode, under the bounds.
        with run.watch("tune"), LastLayer(clipped.forward, run.layer) as features:
            head = {name: value.detach().clone() for name, value in run.layer.state_dict().items()}
            for p in run.work.parameters():
                p.requires_grad_(False)
            for p in run.layer.parameters():
                p.requires_grad_(True)
            for record in fine_tune_head(features.hidden, run.layer, samples, suspects, config):
                log(record, "tune")
        clean = None
        if run.is_poisoned is not None:
            clean = purity(picked.selected, scores.labels, run.is_poisoned, run.num_classes)
        final = {name: z.detach().float().cpu().clone() for name, z in clipped.bounds.items()}
    return PadFTResult(
        run.work, log.history, run.watch.seconds, config, picked.selected, scores.margins, picked.suspects, final,
        short, picked.spread, picked.split, clean, scores.nonfinite, run.layer_name, head,
    )  # fmt: skip


def _check_indices(trusted: Tensor, count: int) -> Tensor:
    expected, remedy = f"int64 [M], distinct indices in [0, {count})", "pass the indices of samples to trust"
    if not isinstance(trusted, Tensor) or trusted.dtype != torch.int64 or trusted.ndim != 1 or len(trusted) == 0:
        got = f"{trusted.dtype} {list(trusted.shape)}" if isinstance(trusted, Tensor) else type(trusted).__name__
        raise ValueError(message("pad_ft", "trusted", expected, got, remedy))
    low, high = (int(bound) for bound in trusted.aminmax())
    if low < 0 or high >= count or len(torch.unique(trusted)) < len(trusted):
        raise ValueError(message("pad_ft", "trusted", expected, f"{low} to {high}, or one twice", remedy))
    return trusted.detach().cpu()


class _Log:
    """Records of both stages, numbered through."""

    def __init__(self, epochs: int, callback: Callback | None) -> None:
        self.history: list[Record] = []
        self._epochs, self._callback = epochs, callback

    def __call__(self, record: Record, stage: str) -> None:
        self.history.append({"stage": stage, "epoch": len(self.history) + 1, "epochs": self._epochs, **record})
        if self._callback is not None:
            self._callback(dict(self.history[-1]))


def _check_selection(selected: Tensor, scores: Scores, num_classes: int, k: int) -> dict[int, int]:
    """Classes with fewer than k selected samples, and how many they have."""
    counts = torch.bincount(scores.labels[selected], minlength=num_classes).tolist()
    if len(selected) == 0:
        remedy = "check the model: its logits are NaN or infinite"
        raise ValueError(message("pad_ft", "model", "finite logits on some samples", "none", remedy))
    if scores.nonfinite:
        text = message(
            "pad_ft", "model", "finite logits", f"{scores.nonfinite} samples without", "they are not selected"
        )
        warnings.warn(text, UserWarning, stacklevel=3)
    empty = [c for c, count in enumerate(counts) if count == 0]
    if empty:
        text = message("pad_ft", "poisoned_data", "samples of every class", f"none of class {empty[:10]} to trust",
                       "expect it to be forgotten")  # fmt: skip
        warnings.warn(text, UserWarning, stacklevel=3)
    return {c: count for c, count in enumerate(counts) if count < k}


def _warn_of_clipping(forward: nn.Module, kept: ResidentData, any_right: bool, config: PadFTConfig) -> None:
    if not any_right:
        text = "the model misclassifies all selected samples; clipping keeps its logits on them as they are"
        warnings.warn(f"pad_ft: {text}", UserWarning, stacklevel=3)
        return
    right = predict(forward, kept, config.score_batch_size).argmax(1) == kept.labels
    lost = 1 - float(right.double().mean())
    if lost > LOST_TOO_MUCH:
        text = (
            f'clipping lost {100 * lost:.0f} points of accuracy on the selected samples; lower lam, or pass keep="best"'
        )
        warnings.warn(f"pad_ft: {text}", UserWarning, stacklevel=3)
