r"""GIC, guided input calibration: bring auxiliary images to where the victim's training data lies, and purify then.

"Revisiting the Auxiliary Data in Backdoor Purification", 2025, https://arxiv.org/abs/2502.07231. Purification by
fine-tuning works with clean images from the training distribution, and worse with what a defender may really hold. GIC
changes the auxiliary images, never the model, and hands them to any purifier.

How sure we are. The paper's losses, architecture and tables were not to be had; its code was not released. Stated by
the abstract and by others' summaries (high confidence): a learned transformation g, guided by the victim itself, with
:math:`\lVert g(x) - x \rVert_p \le \delta`, aligns the auxiliary set with the training distribution. Inferred
(medium): the guide is the victim's own loss on the image's class; g may be a prompt shared by all images; the set is
made once for each victim, as floats. Our design (low): an image's own step as the default, every number, the batch-norm
term, the imprint check. Figures of the paper quoted elsewhere could not be verified, and none is repeated here.

.. math::

    \min_g\; \frac{1}{|D|} \sum_{(x, y) \in D} \mathrm{CE}(f_v(g(x)), y) + w_{bn} R_{bn}(g)
    \quad\text{s.t.}\quad \lVert g(x) - x \rVert_p \le \delta,\; g(x) \in [0, 1]

1. Freeze the victim: eval mode, no weight gradients, batch norms folded.
2. Fit g and transform the set (:mod:`bdfast.defenses.gic.calibrators`).
3. Check that no class has been imprinted (:mod:`bdfast.defenses.gic.imprint`).

Assumed: labelled images, clean, of any distribution near enough to be worth it.

What it is worth. On digits (BadNets, eight families of data, three seeds; benchmarks/results/gic_families), DER changed
by -3.8 points for fine-tuning, -0.9 for FT-SAM and -0.1 for D3 with w_bn = 0, and by -2.2, +1.8 and +0.8 with w_bn = 1,
which was chosen on two of the seeds. Plain fine-tuning loses: what it unlearns, it unlearns under a high loss, and GIC
lowers the loss. Blurred images gain most. Measure before you rely on it.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from bdfast.data import Split, as_tensors
from bdfast.defenses.gic.base import Calibrated
from bdfast.defenses.gic.calibrators import calibrator
from bdfast.defenses.gic.config import GICConfig
from bdfast.defenses.gic.guide import Guide
from bdfast.defenses.gic.imprint import ImprintReport, check_imprint
from bdfast.errors import message
from bdfast.files import check_path
from bdfast.nn.normalize import statistics
from bdfast.runtime.determinism import deterministic_kernels, isolated_rng, stream_seed
from bdfast.runtime.guard import check_in_memory, model_device, usable_device
from bdfast.runtime.plain_json import plain
from bdfast.runtime.progress import Callback, Record, Stopwatch, check_callback
from bdfast.training.workspace import Normalization, check_weights


@dataclass(frozen=True)
class GICResult:
    """What :func:`gic` returns.

    Attributes:
        data: ``(images, labels)`` for a purifier: float32 ``[M, C, H, W]`` in [0, 1] and int64 ``[M]``, on the CPU.
            Never 8 bit: 1/255 is of the size of delta.
        ids: int64 ``[M]``, which auxiliary image each one comes from; originals that were mixed in come last.
        history: a record an epoch of fitting, or a batch of calibrating ("sample"; those of this run, where an earlier
            one was continued).
        timings: seconds a stage (``calibrate``, ``imprint``).
        config: as it ran.
        imprint: see :class:`bdfast.defenses.gic.imprint.ImprintReport`.
        counts: ``images`` (calibrated), ``mixed`` (originals added), ``unchanged`` (the same as before, bit for bit),
            ``nonfinite`` (left alone, since the victim's loss was not finite), ``early`` (stopped before step S).
        distance: mean and largest ||g(x) - x|| in the norm p.
    """

    data: Split = field(repr=False)
    ids: Tensor = field(repr=False)
    history: list[Record] = field(repr=False)
    timings: dict[str, float]
    config: GICConfig
    imprint: ImprintReport
    counts: dict[str, int]
    distance: tuple[float, float]

    def to_json(self) -> str:
        """Everything but images, labels and ids, as one JSON object; numbers that are not finite become null."""
        values = {name: value for name, value in vars(self).items() if name not in ("data", "ids")}
        more = {"drift": self.imprint.drift, "drifted": self.imprint.drifted, "strongest": self.imprint.strongest}
        found = plain(values)
        found["imprint"].update(plain(more))
        return json.dumps(found, allow_nan=False)


def gic(
    model: nn.Module,
    auxiliary_data: object,
    config: GICConfig = GICConfig(),  # noqa: B008  (frozen)
    *,
    callback: Callback | None = None,
    normalize: Normalization | None = None,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> GICResult:
    """Calibrate auxiliary images for a victim (arXiv 2502.07231, reconstructed), to purify it with ``result.data``.

    Args:
        model: the victim, from images ``[N, C, H, W]``, float in [0, 1], to logits ``[N, K]`` or an output with
            ``.logits``. It is copied, and left alone.
        auxiliary_data: a tuple ``(images, labels)`` of tensors (uint8, or float in [0, 1]; int ``[N]``), a map-style
            Dataset or a DataLoader over one; see also :func:`bdfast.data.auxiliary`.
        config: see :class:`GICConfig`.
        callback: called with the record of every epoch or batch; what it raises ends the run.
        normalize: ``(mean, std)`` of a model that does not normalise its own input.
        device: where to work; None is where ``model`` is.
        checkpoint: a folder that keeps what is finished; the same call goes on from it, bit for bit. One of another run
            is refused.

    Returns:
        :class:`GICResult`. Model, train/eval mode, requires_grad flags, random state of the caller are as before.

    Warns:
        UserWarning: a class without an image; losses that are not finite; a class that drifted.

    Raises:
        TypeError, ValueError: arguments of another kind than stated, weights that are not finite.
        LabelRangeError: a label that is no class of the model.

    Example:
        >>> import bdfast
        >>> (images, labels), _, _ = bdfast.data.load("digits", limit=(50, 1))
        >>> model = bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1)
        >>> result = gic(model, (images, labels), GICConfig(steps=3))
        >>> result.data[0].dtype, result.counts["images"], result.distance[1] <= 8 / 255 + 1e-6
        (torch.float32, 50, True)
        >>> result.imprint.loss[1] < result.imprint.loss[0]
        True
    """
    if not isinstance(config, GICConfig):
        raise TypeError(message("gic", "config", "a GICConfig", type(config).__name__, "pass GICConfig(...)"))
    if not isinstance(model, nn.Module):
        raise TypeError(message("gic", "model", "a torch.nn.Module", type(model).__name__, "wrap it in a Module"))
    check_callback("gic", callback)
    check_path("gic", "checkpoint", checkpoint)
    check_in_memory("gic", model)
    place = model_device(model) if device is None else usable_device("gic", device)
    with (
        torch.inference_mode(False),
        torch.autocast(place.type, enabled=False),
        # A data set that augments, or a model that draws in eval mode, draws by the seed.
        isolated_rng(stream_seed(config.seed, "global"), place),
    ):
        return _calibrated(model, auxiliary_data, config, callback, normalize, place, checkpoint)


def _calibrated(
    model: nn.Module,
    auxiliary_data: object,
    config: GICConfig,
    callback: Callback | None,
    normalize: Normalization | None,
    device: torch.device,
    checkpoint: str | os.PathLike[str] | None,
) -> GICResult:
    images, labels = as_tensors(auxiliary_data, "gic", "auxiliary_data")
    check_weights("gic", model)
    place = None if checkpoint is None else Path(checkpoint)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    # 1. The victim as a guide.
    scale = statistics("gic", normalize)
    guide = Guide(model, w_bn=config.w_bn, precision=config.precision, normalize=scale, device=device)
    watch = Stopwatch(guide.device)
    # 2. g, and g(x).
    with watch("calibrate"), deterministic_kernels(config.deterministic, guide.device):
        chosen = calibrator(config)
        chosen.fit(guide, (images, labels), callback=callback, checkpoint=place and place / "fit.pt")
        made = chosen.transform(images, labels, callback=callback, checkpoint=place and place / "images")
    _warn_of_empty_classes(made.labels, chosen.num_classes)
    _warn_of_failures(made)
    # 3. Has a class been imprinted?
    originals = (images.float() / 255 if images.dtype == torch.uint8 else images.float()).cpu()
    with watch("imprint"):
        imprint = check_imprint(
            guide, originals, made.images, made.labels, chosen.num_classes,
            tolerance=config.drift, seed=config.seed, batch_size=config.batch_size,
        )  # fmt: skip
    if imprint.drifted:
        got = f"{imprint.drift:.3f} more for class {imprint.drifted[:10]}"
        text = message("gic", "imprint", "no class to attract images of others", got, "lower delta, or add `mix`")
        warnings.warn(text, UserWarning, stacklevel=3)
    return _result(made, originals, chosen.history, watch.seconds, config, imprint)


def _result(
    made: Calibrated,
    originals: Tensor,
    history: list[Record],
    seconds: dict[str, float],
    config: GICConfig,
    imprint: ImprintReport,
) -> GICResult:
    moved = (made.images - originals).flatten(1)
    lengths = moved.abs().amax(1) if config.p == "inf" else torch.linalg.vector_norm(moved, dim=1)
    count = len(originals)
    generator = torch.Generator().manual_seed(stream_seed(config.seed, "gic mix"))
    added = torch.randperm(count, generator=generator)[: round(config.mix * count)].sort().values
    counts = {
        "images": count,
        "mixed": len(added),
        "unchanged": int((lengths == 0).sum()),
        "nonfinite": int(made.failed.sum()),
        "early": int(made.early.sum()),
    }
    data = torch.cat((made.images, originals[added])), torch.cat((made.labels, made.labels[added]))
    ids = torch.cat((torch.arange(count), added))
    return GICResult(
        data, ids, history, seconds, config, imprint, counts, (float(lengths.mean()), float(lengths.max()))
    )


def _warn_of_empty_classes(labels: Tensor, num_classes: int) -> None:
    empty = (torch.bincount(labels, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty:
        got, remedy = f"none of class {empty[:10]}", "draw a larger share; a purifier forgets what it does not see"
        text = message("gic", "auxiliary_data", "images of every class", got, remedy)
        warnings.warn(text, UserWarning, stacklevel=4)


def _warn_of_failures(made: Calibrated) -> None:
    count = int(made.failed.sum())
    if count:
        first = int(made.failed.nonzero()[0])
        got, remedy = f"{count} others, the first at index {first}", "they are left as they were; look at them"
        text = message("gic", "auxiliary_data", "images with a finite loss", got, remedy)
        warnings.warn(text, UserWarning, stacklevel=4)
