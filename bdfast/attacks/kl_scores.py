r"""How far a patch-limited perturbation moves each prediction: the consistency scores of AdvrBD, of a whole data set.

For sample x with a random patch m and :math:`\delta^*` from :mod:`bdfast.attacks.masked_pgd` (arXiv 2405.12719, eq. 3),

.. math::

    s(x) = \mathrm{KL}\bigl(f(x) \,\|\, f(x + m \circ \delta^*)\bigr)

Large is fragile and presumed clean, small is robust and suspicious. The premise holds for triggers that were learned
well; the plain confidence of the prediction often tells as much (see the table's column), and costs nothing.

Five steps come to some 17 forward passes of the set. What makes them cheap is listed in
:class:`bdfast.runtime.FrozenModel`; with ``precision="bf16"`` the perturbations are sought in bfloat16 and the scores
taken in float32, and the samples of the largest scores, from which one selects, are scored once more in float32.
"""

from __future__ import annotations

import math
import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from bdfast.attacks.masked_pgd import MaskedPGD, Objective
from bdfast.data.dataset import check_labels
from bdfast.data.source import Source, to_floats
from bdfast.errors import message
from bdfast.files import check_path
from bdfast.nn.normalize import statistics
from bdfast.ops import kl_divergence
from bdfast.runtime.batching import auto_batch_size
from bdfast.runtime.chunks import ChunkStore, Columns, backing_off, in_chunks, note_of
from bdfast.runtime.determinism import host_random_state, isolated_rng, seed_host, stream_seed
from bdfast.runtime.frozen import FrozenModel
from bdfast.runtime.guard import model_device, usable_device
from bdfast.runtime.plain_numbers import take_plain_numbers
from bdfast.runtime.precision import PRECISIONS, Precision
from bdfast.runtime.progress import Callback, Record, check_callback
from bdfast.runtime.ranks import Ranks
from bdfast.runtime.score_table import ScoreTable
from bdfast.training.options import check_flag
from bdfast.training.resume import fingerprint

Combine: TypeAlias = Literal["mean", "median", "min"]
Normalization: TypeAlias = "tuple[tuple[float, ...], tuple[float, ...]]"

CHUNK = {"cpu": 512, "cuda": 4096}  # samples a file: half a second of a GPU, ten of a processor, are what a kill costs
RESIDENT = 2**28  # bytes of a chunk that are copied to the device at once; 4096 images of CIFAR's size are 2^24
FORMAT = "bdfast.kl_scores/1"
KINDS = {
    "label": (torch.int64, 1),
    "score": (torch.float32, 1),
    "confidence": (torch.float32, 1),
    "prediction": (torch.int64, 1),
    "halved": (torch.bool, 1),
}


@dataclass(frozen=True)
class KLScoreConfig:
    """How scores are made. The paper gives no numbers: every default of the attack is ours.

    Attributes:
        radius: r, half-width of the patch in pixels (side 2r + 1); None is a quarter of the shorter side, which covers
            some 28 % of the image; one that reaches over the image is all of it.
        eps: L_inf bound of the perturbation, in pixels of [0, 1].
        steps: gradient steps; one ranked as well as five on small networks.
        step_size: alpha, in pixels of [0, 1].
        objective: what the perturbation maximises: ``"kl"`` itself, or ``"ce"``, the cross entropy of the given label.
        patches: random patches a sample, each with its own start.
        combine: how the scores of several patches become one.
        precision: of the search for perturbations; see :class:`bdfast.runtime.FrozenModel`.
        score_precision: of the forward passes whose KL is the score.
        rescore: with ``precision="bf16"``, the share of the samples, those of the largest scores, that are scored once
            more in fp32: the first so and so many of the ranking, which is what is selected from it, are then those of
            fp32. 0 leaves all as they are.
        batch_size: images a batch, or ``"auto"``: from the size of the images, on a GPU from what one image takes.
        compile: run the network through ``torch.compile``.
        seed: of patches and starts.
        round: redraws them.
    """

    radius: int | None = None
    eps: float = 8 / 255
    steps: int = 5
    step_size: float = 2 / 255
    objective: Objective = "kl"
    patches: int = 1
    combine: Combine = "mean"
    precision: Precision = "fp32"
    score_precision: Precision = "fp32"
    rescore: float = 0.1
    batch_size: int | Literal["auto"] = "auto"
    compile: bool = False
    seed: int = 0
    round: int = 0

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        choices = {
            "objective": get_args(Objective),
            "combine": get_args(Combine),
            "precision": PRECISIONS,
            "score_precision": PRECISIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                got = repr(getattr(self, name))
                raise ValueError(message("KLScoreConfig", name, f"one of {', '.join(allowed)}", got, "choose one"))
        check_flag("KLScoreConfig", "compile", self.compile)
        least = {"steps": 1, "patches": 1, "radius": 0, "seed": 0, "round": 0, "batch_size": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if (name, value) in (("radius", None), ("batch_size", "auto")):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
                got, expected = repr(value), f"a whole number, at least {low} and below 2^31"
                raise ValueError(message("KLScoreConfig", name, expected, got, "correct it"))
        for name in ("eps", "step_size", "rescore"):
            value, share = getattr(self, name), name == "rescore"
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1 or (value == 0 and not share):
                expected = "a number in [0, 1]" if share else "a number in (0, 1]"
                remedy = "pass the share of the samples to rescore" if share else "8/255 is a pixel value of 8"
                raise ValueError(message("KLScoreConfig", name, expected, repr(value), remedy))

    def radius_of(self, height: int, width: int) -> int:
        """r in pixels, for images of a size."""
        return min(height, width) // 4 if self.radius is None else self.radius


def kl_scores(
    model: nn.Module,
    data: object,
    config: KLScoreConfig = KLScoreConfig(),
    *,
    ids: Tensor | None = None,  # [M]
    normalize: Normalization | None = None,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    distributed: bool = False,
) -> ScoreTable:
    """Consistency scores of a data set (arXiv 2405.12719, eq. 3): large is fragile, small is robust and suspicious.

    Args:
        model: from images ``[N, C, H, W]``, float in [0, 1], to logits ``[N, K]`` or an output with ``.logits``; it is
            run in eval mode, on a copy.
        data: a tuple ``(images, labels)`` of tensors (uint8, or float in [0, 1]; int ``[N]``), a map-style Dataset or a
            DataLoader over one, or a :class:`bdfast.attacks.PoisonedData`.
        config: see :class:`KLScoreConfig`.
        ids: int64 ``[M]``, distinct indices of the samples to score; all of them by default.
        normalize: ``(mean, std)`` of a model that does not normalise its own input.
        device: where to work; None is where the model is.
        checkpoint: a folder that keeps scores in chunks. A run that was killed goes on from them, to the same bits; one
            of another run is refused.
        callback: called after every chunk with ``epoch`` and ``epochs`` (chunks that this process has done, and all).
        distributed: share the work with the other processes of ``torch.distributed``, all of which make this call and
            get the whole table. Scores do not depend on how many there are.

    Returns:
        A :class:`bdfast.runtime.ScoreTable` in the order of ``ids`` with the columns ``label``, ``prediction`` and
        ``confidence`` (arg-max and largest probability on the clean image) and ``halved`` (computed in a smaller batch,
        because memory ran out); with bf16 ``rescored``, too. A sample with logits that are not finite is in quarantine:
        its score is NaN, its prediction -1.

    Warns:
        UserWarning: a model that draws random numbers in eval mode (on the host, where that can be seen). It draws by
            the seed, so that a rerun gives the same scores; but what a sample meets depends on its place among the
            batches: on ``batch_size``, ``ids`` and the order of the data.

    Raises:
        TypeError, ValueError: arguments of another kind than stated; a checkpoint of another run.
        LabelRangeError: a label that is no class, with ``objective="ce"``.

    Example:
        >>> import bdfast
        >>> (images, labels), _, _ = bdfast.data.load("digits", limit=(20, 1))
        >>> model = bdfast.models.build("digits_cnn", num_classes=10, image_size=8, seed=0)
        >>> table = kl_scores(model, (images, labels), KLScoreConfig(steps=2))
        >>> len(table), bool((table.scores >= 0).all()), sorted(table.columns)
        (20, True, ['confidence', 'halved', 'label', 'prediction'])
    """
    if not isinstance(config, KLScoreConfig):
        raise TypeError(
            message("kl_scores", "config", "a KLScoreConfig", type(config).__name__, "pass KLScoreConfig()")
        )
    if not isinstance(model, nn.Module):
        raise TypeError(message("kl_scores", "model", "a torch.nn.Module", type(model).__name__, "wrap it in a Module"))
    check_callback("kl_scores", callback)
    check_path("kl_scores", "checkpoint", checkpoint)
    source = Source("kl_scores", data, "data")
    chosen = _check_ids(ids, len(source))
    normalize = statistics("kl_scores", normalize)
    place = model_device(model) if device is None else usable_device("kl_scores", device)
    ranks = Ranks.joined() if distributed else Ranks()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(isolated_rng(stream_seed(config.seed, "global"), place))
        scorer = KLScorer(stack, model, config, normalize, place)
        # Rank 0 decides on the size, and makes the folder, before the others look into it.
        batch_size = ranks.share(lambda: _batch_size(config, scorer, source, chosen, checkpoint))
        chunk = batch_size * max(1, CHUNK.get(place.type, CHUNK["cpu"]) // batch_size)
        run = "" if checkpoint is None else _fingerprint(model, source, chosen, config, normalize)

        def open_store() -> ChunkStore | None:
            if checkpoint is None:
                return None
            return ChunkStore(
                "kl_scores", "checkpoint", checkpoint, format=FORMAT, run=run, count=len(chosen), chunk=chunk,
                kinds=KINDS, note=batch_size,
            )  # fmt: skip

        def compute(rows: range) -> Columns:
            part = chosen[rows.start : rows.stop]
            images, labels = source.read(part)
            # A model that draws in eval mode draws the same for a chunk wherever, and after whatever, it is computed.
            seed_host(stream_seed(config.seed, f"kl_scores: rows from {rows.start}"))
            before = host_random_state()
            columns = scorer.chunk(images, labels, part, batch_size)
            if rows.start == 0 and host_random_state() != before:
                _warn_of_draws()
            return columns

        ranks.share(lambda: open_store() is not None)
        chunks = -(-len(chosen) // chunk)
        columns = in_chunks(
            len(chosen), chunk, compute, store=open_store(), ranks=ranks,
            finished=lambda rows: callback and callback(_record(rows, chunk, chunks)),
        )  # fmt: skip
    table = ScoreTable(chosen, columns.pop("score"), columns)
    if config.precision == "fp32" or config.rescore == 0:
        return table
    first = table.top(math.ceil(config.rescore * len(table)))
    if len(first) == 0:
        return table
    again = kl_scores(
        model, data, replace(config, precision="fp32", score_precision="fp32", rescore=0.0), ids=first.sort().values,
        normalize=normalize, device=device, distributed=distributed,
        checkpoint=None if checkpoint is None else Path(checkpoint) / "rescored",
    )  # fmt: skip
    return _merged(table, again)


def _merged(table: ScoreTable, again: ScoreTable) -> ScoreTable:
    """``table`` with the scores of ``again`` in the place of its own."""
    rows = torch.isin(table.ids, again.ids).nonzero().flatten()
    rows = rows[table.ids[rows].argsort()]  # `again` is in the order of its ids
    scores = table.scores.clone()
    scores[rows] = again.scores
    columns = {name: value.clone() for name, value in table.columns.items()}
    columns["halved"][rows] = again.columns["halved"]
    columns["rescored"] = torch.zeros(len(table), dtype=torch.bool).index_fill(0, rows, True)
    return ScoreTable(table.ids, scores, columns)


class KLScorer:
    """Scores of one chunk after the other."""

    def __init__(
        self,
        stack: ExitStack,
        model: nn.Module,
        config: KLScoreConfig,
        normalize: Normalization | None,
        device: torch.device,
    ) -> None:
        def frozen(precision: Precision) -> FrozenModel:
            options = {"normalize": normalize, "compile": config.compile, "device": device, "where": "kl_scores"}
            return stack.enter_context(FrozenModel(model, precision, **options))  # type: ignore[arg-type]

        self._config = config
        self.search = frozen(config.precision)
        same = config.precision == config.score_precision
        self._score = self.search if same else frozen(config.score_precision)
        self._place = torch.zeros(0, dtype=torch.float32, device=device)
        # Graphs and compiled networks are made for one size of batch.
        self._pads = device.type == "cuda" or config.compile
        self._attacks: dict[int, MaskedPGD] = {}

    def chunk(
        self,
        images: Tensor,  # [n, C, H, W]
        labels: Tensor,  # [n]
        ids: Tensor,  # [n]
        batch_size: int,
    ) -> Columns:
        """Columns of some samples, batch by batch; the host waits for a GPU at both ends alone."""
        images, labels, ids = self._near(images), labels.to(self._place.device), ids.to(self._place.device)
        if self._config.objective == "ce":
            logits = self.search.logits(to_floats(images[:1], self._place))
            check_labels(labels, logits.shape[1], "kl_scores", "data: labels")

        def compute(rows: range) -> Columns:
            index = torch.arange(rows.start, rows.stop, device=ids.device)
            if self._pads and len(index) < min(batch_size, len(ids)):
                index = torch.cat((index, index[-1:].expand(min(batch_size, len(ids)) - len(index))))
            parts = self._batch(to_floats(images[index.to(images.device)], self._place), labels[index], ids[index])
            return {name: value[: len(rows)] for name, value in parts.items()}

        parts = []
        for start in range(0, len(ids), batch_size):
            for rows, columns, halved in backing_off(compute, range(start, min(start + batch_size, len(ids)))):
                parts.append({**columns, "halved": torch.full((len(rows),), halved)})
        columns = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        return {"label": labels.cpu(), **columns}

    def _near(self, images: Tensor) -> Tensor:
        """The images on the device, as they are, unless they are large: batch by batch the host would wait for each."""
        return images.to(self._place.device) if images.nbytes <= RESIDENT else images

    def _batch(self, x: Tensor, labels: Tensor, ids: Tensor) -> Columns:
        config = self._config
        clean = self._score.logits(x)
        if config.objective == "ce":
            target = labels
        else:  # the search needs f(x) as its own network gives it: at x' = x the two must agree
            target = clean if self.search is self._score else self.search.logits(x)
        attack = self._attack(config.radius_of(x.shape[2], x.shape[3]))
        rounds = range(config.round * config.patches, (config.round + 1) * config.patches)
        moved = (attack(x, ids, target, seed=config.seed, round=number) for number in rounds)
        scores = torch.stack([kl_divergence(clean, self._score.logits(x_adv)) for x_adv in moved])
        score = _combine(scores, config.combine)
        confidence, prediction = clean.softmax(1).max(1)
        told = clean.isfinite().all(1)
        finite = told & score.isfinite()
        return {
            "score": score.where(finite, torch.nan),
            "confidence": confidence.where(finite, torch.nan),
            "prediction": prediction.where(told, -1),
        }

    def _attack(self, radius: int) -> MaskedPGD:
        if radius not in self._attacks:
            config = self._config
            self._attacks[radius] = MaskedPGD(
                self.search, radius=radius, steps=config.steps, step_size=config.step_size, eps=config.eps,
                objective=config.objective,
            )  # fmt: skip
        return self._attacks[radius]


def _combine(
    scores: Tensor,  # [patches, N]
    how: Combine,
) -> Tensor:
    if how == "median":
        return scores.quantile(0.5, dim=0)
    return scores.mean(0) if how == "mean" else scores.amin(0)


def _batch_size(
    config: KLScoreConfig,
    scorer: KLScorer,
    source: Source,
    ids: Tensor,
    checkpoint: str | os.PathLike[str] | None,
) -> int:
    if config.batch_size != "auto":
        return config.batch_size
    kept = None if checkpoint is None else note_of(checkpoint)
    if isinstance(kept, int) and kept >= 1:
        return kept  # as the run began: memory may be another's now
    return auto_batch_size(scorer.search, source.read(ids[:1])[0].shape[1:])


def _fingerprint(
    model: nn.Module, source: Source, ids: Tensor, config: KLScoreConfig, normalize: Normalization | None
) -> str:
    """What the scores depend on; of the data, its size and the two ends of what is asked for."""
    ends = source.read(ids[[0, -1]])
    scale = [torch.tensor(numbers, dtype=torch.float32) for numbers in normalize or ()]
    return fingerprint("kl_scores", config, (*model.state_dict().values(), *scale, ids, *ends))


def _check_ids(ids: Tensor | None, count: int) -> Tensor:
    if ids is None:
        return torch.arange(count)
    expected, remedy = f"int64 [M], distinct indices in [0, {count})", "pass the indices of the samples to score"
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 1 or len(ids) == 0:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(message("kl_scores", "ids", expected, got, remedy))
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= count or len(torch.unique(ids)) < len(ids):
        raise ValueError(message("kl_scores", "ids", expected, f"{low} to {high}, or one twice", remedy))
    return ids.detach().cpu()


def _warn_of_draws() -> None:
    got = "one that draws random numbers in eval mode"
    remedy = "call dropout with training=self.training; the scores depend on the size of batches"
    warnings.warn(message("kl_scores", "model", "a function of its images", got, remedy), UserWarning, stacklevel=5)


def _record(rows: int, chunk: int, chunks: int) -> Record:
    """Chunks stand where a training loop has epochs."""
    return {"epoch": -(-rows // chunk), "epochs": chunks, "samples": rows}
