"""What all calibrators share: the victim, targets, batches, progress and checkpoints."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from bdfast.data import as_tensors, check_labels
from bdfast.defenses.gic.config import GICConfig
from bdfast.defenses.gic.guide import Guide
from bdfast.errors import message
from bdfast.runtime.chunks import ChunkStore, Columns, backing_off, in_chunks
from bdfast.runtime.progress import Callback, Record, check_callback
from bdfast.training import resume
from bdfast.training.workspace import Normalization

KINDS = {"images": (torch.float32, 4), "early": (torch.bool, 1), "failed": (torch.bool, 1)}

StrPath: TypeAlias = "str | os.PathLike[str]"


class Calibrated(NamedTuple):
    """What a calibrator made, on the CPU."""

    images: Tensor  # [N, C, H, W] float32 in [0, 1]
    labels: Tensor  # [N] int64: the classes that the images were calibrated for
    early: Tensor  # [N] bool: stopped before the last step, confident enough
    failed: Tensor  # [N] bool: left as they were, since their loss was not finite


class Calibrator(ABC):
    """What all calibrators share; see :func:`calibrator`.

    Attributes:
        config: as given.
        guide: the frozen victim, after :meth:`fit`.
        num_classes: K, after :meth:`fit`.
        history: a record an epoch of :meth:`fit`, or a batch of :meth:`transform` with "sample".
    """

    guide: Guide
    num_classes: int

    def __init__(self, config: GICConfig) -> None:
        self.config = config
        self.history: list[Record] = []

    def fit(
        self,
        model: nn.Module | Guide,
        data: object,
        *,
        normalize: Normalization | None = None,
        device: str | torch.device | None = None,
        callback: Callback | None = None,
        checkpoint: StrPath | None = None,
    ) -> Calibrator:
        """Learn g from the victim and the auxiliary set; returns the calibrator itself.

        Args:
            model: from images ``[N, C, H, W]``, float in [0, 1], to logits; it is copied, or a :class:`Guide` is used.
            data: anything that :func:`bdfast.data.as_tensors` takes.
            normalize: ``(mean, std)`` of a model that does not normalise its own input.
            device: where to work; None is where the model is.
            callback: called with every epoch's record.
            checkpoint: a file that is written after every epoch, and continued from if it is there.

        Raises:
            TypeError, ValueError: model or data of another kind.
            LabelRangeError: a label that is no class of the model.
        """
        check_callback("fit", callback)
        images, labels = as_tensors(data, "gic", "auxiliary_data")
        c = self.config
        if isinstance(model, Guide):
            self.guide = model
        else:
            self.guide = Guide(model, w_bn=c.w_bn, precision=c.precision, normalize=normalize, device=device)
        self.num_classes = self.guide.logits(self._floats(images[:2])).shape[1]
        labels = self._targets(images, labels)
        with torch.inference_mode(False), torch.enable_grad():
            self._learn(images, labels, callback, checkpoint)
        return self

    def transform(
        self,
        images: Tensor,  # [N, C, H, W] uint8, or float in [0, 1]
        labels: Tensor | None = None,  # [N] int64
        *,
        callback: Callback | None = None,
        checkpoint: StrPath | None = None,
    ) -> Calibrated:
        """g of some images, which need not be those of :meth:`fit`.

        Args:
            images: in the form of those that it was fitted to.
            labels: their classes. None, or ``labels="pseudo"`` in the config: what the victim takes them for.
            callback: called with every batch's record ("sample").
            checkpoint: a folder that keeps finished batches, and from which they are taken up again.

        Raises:
            RuntimeError: before :meth:`fit`.
            ValueError: images or labels of another form; a folder of another run.
        """
        if not hasattr(self, "guide"):
            raise RuntimeError(message("transform", "self", "a fitted calibrator", "one that is not", "call fit first"))
        check_callback("transform", callback)
        given = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        images, given = as_tensors((images, given.to(images.device)), "transform", "images")
        targets = self._targets(images, None if labels is None else given)
        count, size = len(images), self.config.batch_size
        store = None
        if checkpoint is not None:
            run = resume.fingerprint(f"gic {self.config.mode}", self.config, (*self._fixed(), images, targets))
            store = ChunkStore(
                "gic", "checkpoint", checkpoint, format="bdfast.gic/1", run=run, count=count, chunk=size, kinds=KINDS
            )

        def batch(rows: range) -> Columns:
            place = slice(rows.start, rows.stop)
            x, y = self._floats(images[place]), targets[place].to(self.guide.device)
            made, early, failed = self._batch(x, y)
            return {"images": made.cpu().contiguous(), "early": early.cpu(), "failed": failed.cpu()}

        def compute(rows: range) -> Columns:
            if self.config.w_bn > 0:  # the statistics are those of a batch: it is not to be cut
                columns = batch(rows)
            else:
                parts = [part for _, part, _ in backing_off(batch, rows)]
                columns = {name: torch.cat([part[name] for part in parts]) for name in KINDS}
            if self.config.mode == "sample":
                self._tell(rows, count, columns, callback)
            return columns

        with torch.inference_mode(False), torch.no_grad():
            columns = in_chunks(count, size, compute, store=store)
        return Calibrated(columns["images"], targets.cpu(), columns["early"], columns["failed"])

    def _targets(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """The classes to calibrate for: as given and checked, or what the victim says."""
        if self.config.labels == "given" and labels is not None:
            check_labels(labels, self.num_classes, "gic", "auxiliary_data: labels")
            return labels
        size = self.config.batch_size
        parts = [self.guide.logits(self._floats(part)).argmax(1) for part in torch.split(images, size)]
        return torch.cat(parts).to(images.device)

    def _floats(self, images: Tensor) -> Tensor:
        x = images.to(self.guide.device)
        return x.float() / 255 if x.dtype == torch.uint8 else x.float()

    def _tell(self, rows: range, count: int, columns: Columns, callback: Callback | None) -> None:
        size = self.config.batch_size
        record: Record = {"stage": "calibrate", "epoch": rows.start // size + 1, "epochs": -(-count // size)}
        record["early"] = float(columns["early"].float().mean())
        self.history.append(record)
        if callback is not None:
            callback(dict(record))

    def _fixed(self) -> tuple[Tensor, ...]:
        """What images depend on besides config and input."""
        return self.guide.fingerprint()

    @abstractmethod
    def _learn(self, images: Tensor, labels: Tensor, callback: Callback | None, checkpoint: StrPath | None) -> None: ...

    @abstractmethod
    def _batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Calibrated images, which of them stopped early, and which failed."""
