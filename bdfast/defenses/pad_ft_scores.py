"""One pass over the training set: how clean each sample looks, in chunks that survive a kill.

What is kept a sample is 4 bytes of score, 12 of classes and, for the split, a sketch of its features; images and logits
live for one batch. With a folder, each chunk is written as it is finished, and the next run takes up there.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from bdfast.data import as_tensors
from bdfast.errors import LabelRangeError, message
from bdfast.files import atomic_write
from bdfast.ops import sce_margin

CHUNK = 8192  # samples a file: half a second of a GPU, so that a kill costs no more
FORMAT = "bdfast.pad_ft.scores/1"
ARRAYS = ("margins", "labels", "runner_up", "sketch")  # the fields of Scores
MAX_MANIFEST = 1 << 16  # bytes

Features = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images [B, C, H, W] in [0, 1] to the input of the last layer [B, D] and the logits [B, K]."""


@dataclass(frozen=True)
class Scores:
    """What step 1 knows of every sample, by its index.

    Attributes:
        margins: float32 ``[N]``, :func:`bdfast.ops.sce_margin`: the smaller, the cleaner; +Inf is not trusted.
        labels: int64 ``[N]``, as given.
        runner_up: int32 ``[N]``, the class of the largest logit beside the label's.
        sketch: float32 ``[N, d]``, the features or a projection of them that keeps their distances; d may be 0.
    """

    margins: Tensor
    labels: Tensor
    runner_up: Tensor
    sketch: Tensor

    @property
    def nonfinite(self) -> int:
        """Samples with a NaN or infinity among their logits."""
        return int((self.margins == float("inf")).sum())


class Source:
    """A data set that is read in parts: tensors by slice, anything else sample by sample.

    Raises:
        TypeError, ValueError: as :func:`bdfast.data.as_tensors`, on construction or when a part is read.

    Example:
        >>> source = Source("example", (torch.zeros(5, 1, 2, 2), torch.arange(5)))
        >>> len(source), source.read(torch.tensor([4, 1]))[1]
        (5, tensor([4, 1]))
    """

    def __init__(self, where: str, data: object, argument: str = "poisoned_data") -> None:
        self._where, self._argument = where, argument
        inner = data.dataset if isinstance(data, DataLoader) else data
        held = isinstance(getattr(inner, "images", None), Tensor) and isinstance(getattr(inner, "labels", None), Tensor)
        lazy = isinstance(inner, Dataset) and not isinstance(inner, TensorDataset) and not held
        self._dataset: Any = inner if lazy and hasattr(inner, "__len__") and hasattr(inner, "__getitem__") else None
        self._tensors = None if self._dataset is not None else as_tensors(data, where, argument)

    def __len__(self) -> int:
        return len(self._dataset) if self._dataset is not None else len(self._tensors[1])  # type: ignore[arg-type,index]

    def read(
        self,
        indices: Tensor | range,  # [B]
    ) -> tuple[Tensor, Tensor]:
        """Images (uint8, or float in [0, 1]) and int64 labels of some samples."""
        if self._dataset is not None:
            chosen = indices.tolist() if isinstance(indices, Tensor) else list(indices)
            return as_tensors(Subset(self._dataset, chosen), self._where, self._argument)
        assert self._tensors is not None
        images, labels = self._tensors
        if isinstance(indices, range):
            return images[indices.start : indices.stop], labels[indices.start : indices.stop]
        return images[indices.to(images.device)], labels[indices.to(labels.device)]


def score(
    where: str,
    features: Features,
    source: Source,
    *,
    num_classes: int,
    place: Tensor,
    batch_size: int,
    dims: int,
    seed: int,
    run: str,
    folder: str | os.PathLike[str] | None = None,
) -> Scores:
    """Scores of all samples in index order.

    Args:
        where: the function on whose behalf this happens; it opens the messages.
        features: the frozen network.
        source: the samples.
        num_classes: K.
        place: a tensor of the device and dtype that ``features`` wants.
        batch_size: images a forward pass.
        dims: width of the sketch: features as they are up to this, a random projection above; 0 for none.
        seed: of the projection.
        run: what the scores depend on, as a hash; chunks of another run are refused.
        folder: where chunks are kept, and found again.

    Raises:
        ValueError: the folder belongs to another run.
        LabelRangeError: a label that is no class.
    """
    store = None if folder is None else _Store(where, Path(folder), run, len(source))
    parts = []
    for start in range(0, len(source), CHUNK):
        rows = range(start, min(start + CHUNK, len(source)))
        part = None if store is None else store.load(rows)
        if part is None:
            part = _score_chunk(where, features, source, rows, num_classes, place, batch_size, dims, seed)
            if store is not None:
                store.save(rows, part)
        parts.append(part)
    return Scores(*(torch.cat([getattr(p, name) for p in parts]) for name in ARRAYS))


@torch.no_grad()
def _score_chunk(
    where: str, features: Features, source: Source, rows: range, num_classes: int, place: Tensor, batch_size: int,
    dims: int, seed: int,
) -> Scores:  # fmt: skip
    images, labels = source.read(rows)
    labels = labels.cpu()
    _check_labels(where, labels, rows.start, num_classes)
    margins, runners_up, sketches = [], [], []
    for begin in range(0, len(rows), batch_size):
        x = to_floats(images[begin : begin + batch_size], place)
        hidden, logits = features(x)
        given = labels[begin : begin + batch_size].to(logits.device)
        margins.append(sce_margin(logits, given).float())
        runners_up.append(logits.scatter(1, given[:, None], -float("inf")).argmax(1).int())
        sketches.append(_sketch(hidden, dims, seed))
    return Scores(torch.cat(margins).cpu(), labels, torch.cat(runners_up).cpu(), torch.cat(sketches).cpu())


def to_floats(
    images: Tensor,  # [B, C, H, W] uint8, or float in [0, 1]
    place: Tensor,
) -> Tensor:
    """Pixels in [0, 1], in the dtype and on the device of ``place``."""
    x = images.to(place.device).to(place.dtype)
    return x / 255 if images.dtype == torch.uint8 else x


def _sketch(
    hidden: Tensor,  # [B, D]
    dims: int,
    seed: int,
) -> Tensor:
    hidden = hidden.float()
    if hidden.shape[1] <= dims:
        return hidden
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(hidden.shape[1], dims, generator=generator) / max(dims, 1) ** 0.5
    return torch.mm(hidden, projection.to(hidden.device))


def _check_labels(where: str, labels: Tensor, offset: int, num_classes: int) -> None:
    outside = (labels < 0) | (labels >= num_classes)
    if bool(outside.any()):
        first = int(outside.to(torch.uint8).argmax())
        got = f"{int(labels[first])} at index {offset + first}"
        expected, remedy = f"classes in [0, {num_classes})", "drop those samples or correct the number of classes"
        raise LabelRangeError(message(where, "poisoned_data: labels", expected, got, remedy))


class _Store:
    """A folder of chunks and a manifest that says of which run they are."""

    def __init__(self, where: str, folder: Path, run: str, count: int) -> None:
        self._folder, self._run = folder, run
        manifest = {"format": FORMAT, "run": run, "samples": count, "chunk": CHUNK}
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "manifest.json"
        if file.exists():
            if _read_manifest(file) != manifest:
                got = "one of another model, config or data set, or a damaged one"
                remedy = "take another folder, or empty this one to start afresh"
                raise ValueError(message(where, "scores_dir", f"scores of this very run in {folder}", got, remedy))
        else:
            with atomic_write(file) as stream:
                json.dump(manifest, stream)

    def _file(self, rows: range) -> Path:
        return self._folder / f"scores-{rows.start // CHUNK:06d}.npz"

    def save(self, rows: range, part: Scores) -> None:
        content = io.BytesIO()
        arrays = {name: getattr(part, name).numpy() for name in ARRAYS}
        np.savez(content, run=np.array(self._run), **arrays)
        with atomic_write(self._file(rows), "wb") as stream:
            stream.write(content.getvalue())

    def load(self, rows: range) -> Scores | None:
        """The chunk, or None where it is missing or damaged: then it is computed again."""
        try:
            with np.load(self._file(rows)) as archive:  # allow_pickle is False
                if str(archive["run"]) != self._run:
                    return None
                arrays = [archive[name] for name in ARRAYS]
        except Exception:  # a damaged file can fail in any way
            return None
        if [array.dtype for array in arrays] != [np.float32, np.int64, np.int32, np.float32]:
            return None
        if [array.ndim for array in arrays] != [1, 1, 1, 2] or {len(array) for array in arrays} != {len(rows)}:
            return None
        return Scores(*(torch.from_numpy(array) for array in arrays))


def _read_manifest(file: Path) -> object:
    if file.stat().st_size > MAX_MANIFEST:
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None


class LastLayer:
    """Reads what goes into a network's last linear layer; a context, since it hangs a hook on it.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with LastLayer(net, net[3]) as features:
        ...     hidden, logits = features(torch.rand(5, 1, 2, 2))
        >>> hidden.shape, logits.shape
        (torch.Size([5, 3]), torch.Size([5, 2]))
    """

    def __init__(self, forward: nn.Module, layer: nn.Linear) -> None:
        self._forward, self._layer = forward, layer

    def __enter__(self) -> LastLayer:
        self._handle = self._layer.register_forward_pre_hook(self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def __call__(
        self,
        images: Tensor,  # [B, C, H, W] in [0, 1]
    ) -> tuple[Tensor, Tensor]:
        self._hidden: Tensor | None = None
        output = self._forward(images)
        logits: Tensor = getattr(output, "logits", output)
        assert self._hidden is not None
        return self._hidden, logits

    @torch.no_grad()
    def hidden(
        self,
        images: Tensor,  # [B, C, H, W] in [0, 1]
    ) -> Tensor:
        """The features alone, without gradients."""
        return self(images)[0]

    def _catch(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0]
