r"""AdvrBD: split a poisoned training set without clean data, and train a clean model on what is left.

"How to Train a Backdoor-Robust Model on a Poisoned Dataset without Auxiliary Data?", 2024,
https://arxiv.org/abs/2405.12719. The defender holds the poisoned set D and controls the training; the poison ratio is
unknown. The paper's text lacks its algorithms, which are reconstructed from the prose:

1. Warm-up. Train f on all of D for E0 epochs.
2. Partition. A prediction that a patch-limited perturbation hardly moves is suspicious: of all samples that are left,
   D_u, the gamma N of largest :math:`s(x) = \mathrm{KL}(f(x) \| f(x + m \circ \delta^*))` go to D_c (eq. 3).
3. Enhancement. For E1 epochs, descend on D_u and ascend on D_c (eq. 4), so that f keeps the backdoor and little else.
   Steps 2 and 3 are repeated T times.
4. Identification. :math:`D_{clean} = D_c \cup \{x : \arg\max f(x) \ne y\}`; the rest, D_p, behaves as poison does.
5. Clean training. A fresh model g is trained on D_clean.
6. Relabelling. A copy of g is fine-tuned on D_clean and on D_p with the labels that g gives (eq. 5).

The preset ``paper`` is that. Everything hangs on D_c: with a few poisoned samples in it, step 3 unlearns the trigger as
well, step 4 takes the poison for clean, and g has the backdoor again; and s, which is to keep them out, ranks the
poison of WaNet and TaCT above clean samples of the target class on scikit-learn's digits. The preset ``robust`` asks
networks that never saw a class whether its samples belong to it (:mod:`bdfast.defenses.advrbd.content`), in step 2
together with how sure f is of its prediction, in place of s, and in step 4 as a second opinion, as long as they
recognise most samples; and it asks, after step 4, what the suspects have that D_clean lacks
(:mod:`bdfast.defenses.advrbd.contrast`): those that differ in nothing are clean as well, which most of them are. What
either preset reaches, and where it fails, is in docs/defenses.md.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bdfast.defenses.advrbd.config import AdvrBDConfig
from bdfast.defenses.advrbd.content import dealt, tells_classes
from bdfast.defenses.advrbd.identification import identify, misclassified_by, recovered
from bdfast.defenses.advrbd.partition import partition, planned_rounds, round_size
from bdfast.defenses.advrbd.quality import as_labelled, auroc, purity, split_quality
from bdfast.defenses.advrbd.run import Factory, Run, open_run
from bdfast.errors import message
from bdfast.runtime.plain_json import plain
from bdfast.runtime.progress import Callback, Record, check_callback
from bdfast.training.results import TrainedResult
from bdfast.training.workspace import Normalization


@dataclass(frozen=True)
class AdvrBDResult(TrainedResult):
    """What :func:`advrbd` returns.

    Attributes:
        model: g, trained on D_clean: the main result. In eval mode, as is the next one.
        relabeled_model: g fine-tuned on all samples; None without ``relabel``, or where nothing was suspected.
        clean_indices, poisoned_indices: int64, sorted: D_clean and D_p.
        scores: float32 ``[N]`` of the first partition: larger is presumed cleaner; NaN could not be scored.
        content: float32 ``[N]``, content margins, above 0 where a sample looks like its class; None where unused.
        contrast: float32 ``[N]``, log density ratios of the samples that were suspected before the looks, NaN of all
            others: above 0 a sample has what D_clean lacks. None without ``looks``.
        dc_indices: int64, D_c in the order of selection.
        history: a record an epoch of every stage: ``stage`` ("warm_up", "content 0", "enhance 0", "look 0.0",
            "clean", "relabel"), ``epoch`` (counted through), ``epochs``, ``loss``, ``accuracy`` (as met in
            training; of a look, of telling the sides apart), ``lr``, ``seconds``; of an enhancement also ``dc_loss``.
        rounds: a record a round: ``round`` (from 1), ``added``, ``dc`` (samples in D_c), ``misclassified`` (samples,
            after enhancement) and, with ground truth, ``auroc`` (of the scores of what was left), ``purity`` and
            ``leaked`` (of what was added), ``clean_as_labelled`` and ``poisoned_as_labelled`` (after enhancement).
        quality: with ground truth, how good the split is; see :func:`bdfast.defenses.advrbd.quality.split_quality`.
        nonfinite: samples that could not be scored.
        timings: seconds a stage (``setup``, ``warm_up``, ``content``, ``partition``, ``enhance``, ``identify``,
            ``look``, ``clean``, ``relabel``).
        config: as it ran.
    """

    config: AdvrBDConfig
    relabeled_model: nn.Module | None = field(repr=False)
    clean_indices: Tensor = field(repr=False)
    poisoned_indices: Tensor = field(repr=False)
    scores: Tensor = field(repr=False)
    content: Tensor | None = field(repr=False)
    contrast: Tensor | None = field(repr=False)
    dc_indices: Tensor = field(repr=False)
    rounds: list[Record]
    quality: dict[str, Any] | None
    nonfinite: int

    def to_json(self) -> str:
        """Everything but the models and the scores, as one JSON object; numbers that are not finite become null."""
        tensors = {n: getattr(self, n).tolist() for n in ("clean_indices", "poisoned_indices", "dc_indices")}
        hidden = ("model", "relabeled_model", "scores", "content", "contrast", *tensors)
        values = {name: value for name, value in vars(self).items() if name not in hidden}
        return json.dumps(plain({**values, **tensors}), allow_nan=False)


def advrbd(
    model_factory: Factory,
    poisoned_data: object,
    config: AdvrBDConfig = AdvrBDConfig(),  # noqa: B008  (frozen)
    *,
    callback: Callback | None = None,
    normalize: Normalization | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    ground_truth: Tensor | None = None,
) -> AdvrBDResult:
    """Split the poisoned set and train a clean model on the clean part (arXiv 2405.12719).

    Args:
        model_factory: makes a new network at every call, on the device to work on, from images ``[N, C, H, W]``, float
            in [0, 1], to logits ``[N, K]`` or an output with ``.logits``. Its draws from the global generators are
            seeded by ``config.seed``, a stage each.
        poisoned_data: the training set: a tuple ``(images, labels)`` of tensors (uint8, or float in [0, 1]; int
            ``[N]``), a map-style Dataset or a DataLoader over one, or a :class:`bdfast.attacks.PoisonedData`.
        config: see :class:`AdvrBDConfig`.
        callback: called with every epoch's record; what it raises ends the run.
        normalize: ``(mean, std)`` of networks that do not normalise their own input.
        checkpoint: a folder that keeps what is done; the same call goes on from it and ends with the same result. A
            folder of another run is refused.
        ground_truth: bool ``[N]``, which samples are poisoned; by default that of a ``PoisonedData``. It is for the
            records, and for rank="oracle".

    Returns:
        :class:`AdvrBDResult`. The random state of the caller is as before.

    Warns:
        UserWarning: the enhanced network misclassifies nothing; a class without a clean sample; content that tells few
            samples by their class.

    Raises:
        TypeError, ValueError: arguments of another kind than stated; a gamma that adds no sample, or leaves none.
        LabelRangeError: a label that is no class of the network.
        FloatingPointError: a loss or a weight was no longer finite at the end of an epoch.

    Example:
        >>> import bdfast
        >>> data, _, _ = bdfast.data.load("digits", limit=(200, 1))
        >>> build = lambda: bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1)
        >>> options = dict(warm_up_epochs=1, enhance_epochs=1, epochs=1, rounds=2, steps=1)
        >>> result = advrbd(build, bdfast.attacks.poison(*data, "badnets"), AdvrBDConfig.for_digits(**options))
        >>> len(result.clean_indices) + len(result.poisoned_indices), [r["dc"] for r in result.rounds]
        (200, [10, 20])
    """
    if not isinstance(config, AdvrBDConfig):
        raise TypeError(message("advrbd", "config", "an AdvrBDConfig", type(config).__name__, "pass AdvrBDConfig(...)"))
    check_callback("advrbd", callback)
    with open_run(model_factory, poisoned_data, config, normalize, ground_truth, callback, checkpoint) as (run, f):
        labels, samples = run.labels, len(run.labels)
        rounds = planned_rounds(samples, run.num_classes, config)
        run.epochs = _planned_epochs(run, rounds)
        everything = torch.ones(samples, dtype=torch.bool)

        # 1. Warm-up on everything. [O] Networks that never saw a class say what belongs to it.
        run.train("warm_up", f, everything, epochs=config.warm_up_epochs, lr=config.warm_up_lr)
        warmed_up = {name: value.clone() for name, value in f.state_dict().items()}
        content = run.content() if config.rank == "content" or config.content_check else None
        checked = content if content is not None and tells_classes(content) and config.content_check else None

        in_dc = torch.zeros(samples, dtype=torch.bool)
        order, records, predictions, first = [], [], [], torch.empty(0, dtype=torch.float32)
        for number in range(rounds):
            # 2. The largest scores of D_u go to D_c.
            scores = run.scores(f, number, content)
            first = scores if number == 0 else first
            count = round_size(samples, int((~in_dc).sum()), config)
            added = partition(scores, labels, in_dc, count, per_class=config.per_class)
            record = {"round": number + 1, "added": len(added), **_partition_truth(run, scores, in_dc, added)}
            in_dc[added] = True
            order.append(added)

            # 3. Forget what D_c has in common with the rest.
            run.enhance(f, in_dc, number)
            predictions.append(run.predictions(f))
            records.append({**record, "dc": int(in_dc.sum()), **_prediction_truth(run, predictions[-1])})

        # 4. What the enhanced network (or all of the rounds' networks) no longer classifies as labelled is clean. [O]
        # So is what then differs from it in nothing.
        with run.watch("identify"):
            clean = identify(
                misclassified_by(predictions, labels, config.vote), labels, in_dc, first,
                keep_dc=config.keep_dc, min_per_class=config.min_per_class,
                content=checked,
            )  # fmt: skip
        _check_any_clean(clean)
        contrast = _look_again(run, f, warmed_up, ~clean) if config.looks else None
        clean = clean if contrast is None else recovered(clean, contrast, checked)

        # 5. A fresh model, on the clean part.
        g = run.fresh("clean")
        run.train("clean", g, clean, epochs=config.epochs, lr=config.lr)

        # 6. The rest, as that model labels it.
        relabeled = _relabel(run, g, clean) if config.relabel and not bool(clean.all()) else None
        quality = None
        if run.is_poisoned is not None:
            quality = split_quality(clean, labels, run.is_poisoned, getattr(poisoned_data, "original_labels", None))
    return AdvrBDResult(
        g.eval(), run.history, run.watch.seconds, config, relabeled and relabeled.eval(),
        clean_indices=clean.nonzero().flatten(), poisoned_indices=(~clean).nonzero().flatten(), scores=first,
        content=content, contrast=contrast, dc_indices=torch.cat(order), rounds=records, quality=quality,
        nonfinite=int(first.isnan().sum()),
    )  # fmt: skip


def _look_again(run: Run, model: nn.Module, warmed_up: dict[str, Tensor], suspected: Tensor) -> Tensor:
    """Log density ratios of the suspects, the mean of all looks; NaN of all others."""
    if int(suspected.sum()) < 2:  # each is judged by what another one teaches
        run.epochs -= 2 * run.config.looks * run.config.look_epochs
        return torch.full(suspected.shape, float("nan"), dtype=torch.float32)
    looks = range(run.config.looks)
    return torch.stack([run.look(model, warmed_up, suspected, number) for number in looks]).mean(0)


def _relabel(run: Run, g: nn.Module, clean: Tensor) -> nn.Module:
    """g fine-tuned on D_clean and on D_p with the labels that g gives; D_p's samples without a prediction are left."""
    predictions = run.predictions(g)
    labels = torch.where(clean, run.labels, predictions)
    model = copy.deepcopy(g)
    run.train(
        "relabel", model, labels >= 0, labels.clamp_min(0), epochs=run.config.relabel_epochs, lr=run.config.relabel_lr
    )
    return model


def _planned_epochs(run: Run, rounds: int) -> int:
    """Epochs of all stages together."""
    c = run.config
    networks = len(dealt(run.num_classes, c.content_networks)) if c.rank == "content" or c.content_check else 0
    relabel = c.relabel_epochs if c.relabel else 0
    return (
        c.warm_up_epochs
        + networks * c.content_epochs
        + rounds * c.enhance_epochs
        + 2 * c.looks * c.look_epochs
        + c.epochs
        + relabel
    )


def _partition_truth(run: Run, scores: Tensor, in_dc: Tensor, added: Tensor) -> Record:
    if run.is_poisoned is None:
        return {}
    return {"auroc": auroc(scores[~in_dc], run.is_poisoned[~in_dc]), **purity(added, run.is_poisoned)}


def _prediction_truth(run: Run, predictions: Tensor) -> Record:
    told = {"misclassified": int(((predictions != run.labels) & (predictions >= 0)).sum())}
    return told if run.is_poisoned is None else {**told, **as_labelled(predictions, run.labels, run.is_poisoned)}


def _check_any_clean(clean: Tensor) -> None:
    if not bool(clean.any()):
        got, remedy = "none", "leave content_check and keep_dc as they are, or set min_per_class"
        raise ValueError(message("advrbd", "poisoned_data", "clean samples in the end", got, remedy))
