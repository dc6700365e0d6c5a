"""One pass over the training set: how clean each sample looks, in chunks that survive a kill.

What is kept a sample is 4 bytes of score, 12 of classes and, for the split, a sketch of its features; images and logits
live for one batch. With a folder, each chunk is written as it is finished, and the next run takes up there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bdfast.data.source import Source, to_floats
from bdfast.errors import LabelRangeError, message
from bdfast.ops import sce_margin
from bdfast.runtime.chunks import ChunkStore, Columns, in_chunks
from bdfast.runtime.ranks import ALONE, Ranks

CHUNK = 8192  # samples a file: half a second of a GPU, so that a kill costs no more
FORMAT = "bdfast.pad_ft.scores/1"
ARRAYS = {  # the fields of Scores
    "margins": (torch.float32, 1),
    "labels": (torch.int64, 1),
    "runner_up": (torch.int32, 1),
    "sketch": (torch.float32, 2),
}

Features = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images [B, C, H, W] in [0, 1] to the input of the last layer [B, D] and the logits [B, K]."""


class Caller(NamedTuple):
    """The function that a user called, for messages: its name, and what its arguments are called."""

    where: str
    data: str
    folder: str


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


def score(
    caller: Caller,
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
    ranks: Ranks = ALONE,
    finished: Callable[[int], object] | None = None,
) -> Scores:
    """Scores of all samples in index order.

    Args:
        caller: on whose behalf this happens.
        features: the frozen network.
        source: the samples.
        num_classes: K.
        place: a tensor of the device and dtype that ``features`` wants.
        batch_size: images a forward pass.
        dims: width of the sketch: features as they are up to this, a random projection above; 0 for none.
        seed: of the projection.
        run: what the scores depend on, as a hash; chunks of another run are refused.
        folder: where chunks are kept, and found again.
        ranks: the processes that share the work.
        finished: told after every chunk how many samples this process has done.

    Raises:
        ValueError: the folder belongs to another run.
        LabelRangeError: a label that is no class.
    """

    def open_store() -> ChunkStore | None:
        if folder is None:
            return None
        return ChunkStore(
            caller.where, caller.folder, folder, format=FORMAT, run=run, count=len(source), chunk=CHUNK, kinds=ARRAYS
        )

    def compute(rows: range) -> Columns:
        return _score_chunk(caller, features, source, rows, num_classes, place, batch_size, dims, seed)

    ranks.share(lambda: open_store() and None)  # rank 0 makes the folder before the others look into it
    store = open_store()
    return Scores(**in_chunks(len(source), CHUNK, compute, store=store, ranks=ranks, finished=finished))


@torch.no_grad()
def _score_chunk(
    caller: Caller, features: Features, source: Source, rows: range, num_classes: int, place: Tensor, batch_size: int,
    dims: int, seed: int,
) -> Columns:  # fmt: skip
    images, labels = source.read(rows)
    labels = labels.cpu()
    _check_labels(caller, labels, rows.start, num_classes)
    margins, runners_up, sketches = [], [], []
    for begin in range(0, len(rows), batch_size):
        x = to_floats(images[begin : begin + batch_size], place)
        hidden, logits = features(x)
        given = labels[begin : begin + batch_size].to(logits.device)
        margins.append(sce_margin(logits, given).float())
        runners_up.append(logits.scatter(1, given[:, None], -float("inf")).argmax(1).int())
        sketches.append(_sketch(hidden, dims, seed))
    return {
        "margins": torch.cat(margins).cpu(),
        "labels": labels,
        "runner_up": torch.cat(runners_up).cpu(),
        "sketch": torch.cat(sketches).cpu(),
    }


def _sketch(
    hidden: Tensor,  # [B, D]
    dims: int,
    seed: int,
) -> Tensor:
    hidden = hidden.float()
    if hidden.shape[1] <= dims:
        return hidden
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(hidden.shape[1], dims, generator=generator, dtype=torch.float32) / max(dims, 1) ** 0.5
    return torch.mm(hidden, projection.to(hidden.device))


def _check_labels(caller: Caller, labels: Tensor, offset: int, num_classes: int) -> None:
    outside = (labels < 0) | (labels >= num_classes)
    if bool(outside.any()):
        first = int(outside.to(torch.uint8).argmax())
        got = f"{int(labels[first])} at index {offset + first}"
        expected, remedy = f"classes in [0, {num_classes})", "drop those samples or correct the number of classes"
        raise LabelRangeError(message(caller.where, f"{caller.data}: labels", expected, got, remedy))
