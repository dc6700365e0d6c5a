"""Streaming scores: chunks, sketches, and going on after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from bdfast import models
from bdfast.data.source import Source
from bdfast.defenses import PadFTConfig, PadFTResult, pad_ft
from bdfast.defenses.last_layer import LastLayer
from bdfast.defenses.pad_ft import scores as pad_ft_scores
from bdfast.defenses.pad_ft.algorithm import CALLER
from bdfast.defenses.pad_ft.scores import Scores, score
from bdfast.errors import LabelRangeError

NET = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


class Samples(Dataset[tuple[Tensor, int]]):
    """20 images that are made when asked for; counts the reads."""

    def __init__(self) -> None:
        self.images = None  # no tensors to take at once
        self.reads: list[int] = []

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads.append(index)
        return torch.full((1, 2, 2), index / 20), index % 3


def everything() -> tuple[Tensor, Tensor]:
    return (torch.arange(20)[:, None, None, None] / 20).expand(20, 1, 2, 2).contiguous(), torch.arange(20) % 3


def run(data: object, folder: Path | None = None, *, key: str = "run", dims: int = 6, batch: int = 4) -> Scores:
    with LastLayer(NET, NET[3]) as features:  # type: ignore[arg-type]
        return score(
            CALLER, features, Source("pad_ft", data), num_classes=3, place=torch.zeros(0), batch_size=batch,
            dims=dims, seed=0, run=key, folder=folder,
        )  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pad_ft_scores, "CHUNK", 8)


def same(a: Scores, b: Scores) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in pad_ft_scores.ARRAYS)


def test_margins_labels_and_features_in_index_order() -> None:
    images, labels = everything()
    found = run((images, labels))
    with torch.no_grad():
        hidden = NET[:3](images)
        logits = NET[3](hidden)
    others = logits.masked_fill(nn.functional.one_hot(labels, 3).bool(), -torch.inf).logsumexp(1)
    assert torch.allclose(found.margins, others - logits.gather(1, labels[:, None])[:, 0], atol=1e-6)
    assert torch.equal(found.labels, labels)
    top = logits.argsort(1, descending=True)
    second = torch.where(top[:, 0] == labels, top[:, 1], top[:, 0])
    assert torch.equal(found.runner_up, second.int())
    assert torch.allclose(found.sketch, hidden, atol=1e-6)


def test_bytes_are_divided_by_255() -> None:
    images = torch.randint(0, 256, (5, 1, 2, 2), dtype=torch.uint8)
    labels = torch.zeros(5, dtype=torch.int64)
    assert same(run((images, labels)), run((images / 255, labels)))


def test_a_data_set_is_read_in_parts_and_gives_the_same() -> None:
    data = Samples()
    assert same(run(data), run(everything()))
    assert data.reads == list(range(20))
    loader = DataLoader(Samples(), batch_size=3, shuffle=True)
    assert same(run(loader), run(everything()))


def test_iterable_data_is_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(())

    with pytest.raises(TypeError, match=r"pad_ft: `poisoned_data` expected a map-style data set"):
        Source("pad_ft", Stream())


def test_a_wide_sketch_keeps_distances() -> None:
    hidden = torch.randn(200, 2048, generator=torch.Generator().manual_seed(0))
    hidden[:100] *= 2
    sketch = pad_ft_scores._sketch(hidden, 64, 0)
    assert sketch.shape == (200, 64)
    ratio = sketch[:100].var(0).sum() / sketch[100:].var(0).sum()
    assert 3.5 < float(ratio) < 4.5
    assert pad_ft_scores._sketch(hidden, 0, 0).shape == (200, 0)


def test_labels_out_of_range_are_named_by_their_index() -> None:
    images, labels = everything()
    labels[13] = 3
    with pytest.raises(LabelRangeError, match=r"classes in \[0, 3\), got 3 at index 13; drop"):
        run((images, labels))


def test_chunks_are_kept_and_found(tmp_path: Path) -> None:
    first = run(everything(), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "manifest.json", "scores-000000.npz", "scores-000001.npz", "scores-000002.npz",
    ]  # fmt: skip
    data = Samples()
    assert same(run(data, tmp_path), first)
    assert data.reads == []
    (tmp_path / "scores-000001.npz").unlink()
    assert same(run(data, tmp_path), first)
    assert data.reads == list(range(8, 16))


@pytest.mark.parametrize("damage", ["cut", "pickle", "shape", "other run"])
def test_damaged_chunks_are_computed_again(tmp_path: Path, damage: str) -> None:
    first = run(everything(), tmp_path)
    file = tmp_path / "scores-000000.npz"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif damage == "pickle":
        np.savez(file, run=np.array("run"), margins=np.array([print], dtype=object), labels=0, sketch=0)
    elif damage == "shape":
        three = {"margins": np.float32, "labels": np.int64, "runner_up": np.int32}
        arrays = {name: np.zeros(3, kind) for name, kind in three.items()}
        np.savez(file, run=np.array("run"), sketch=np.zeros((3, 6), np.float32), **arrays)
    else:
        with np.load(file) as archive:
            np.savez(file, **{**archive, "run": np.array("another")})
    assert same(run(everything(), tmp_path), first)


@pytest.mark.parametrize("content", [None, "{", "[]", "x" * 100_000])
def test_another_run_is_refused(tmp_path: Path, content: str | None) -> None:
    run(everything(), tmp_path)
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"pad_ft: `scores_dir` expected scores of this very run .* take another folder"
    ):
        run(everything(), tmp_path, key="run" if content else "other")


class Slow(Dataset[tuple[Tensor, int]]):
    """64 images of 4 classes, each of which takes its time."""

    def __init__(self, delay: float) -> None:
        self._delay = delay

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(self._delay)
        return torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(index)), index % 4


def defend(folder: Path | None, delay: float) -> PadFTResult:
    """PAD-FT in chunks of 8 samples; the process that is killed calls it, too."""
    torch.set_num_threads(1)
    model = models.build("digits_cnn", num_classes=4, image_size=8, channels=1, seed=0).eval()
    config = PadFTConfig(preset="robust", k=5, clip_epochs=1, epochs=1, seed=3)
    return pad_ft(model, Slow(delay), config, scores_dir=folder)


KILLED = """
from pathlib import Path
from bdfast.defenses.pad_ft import scores as pad_ft_scores
from tests.defenses.test_pad_ft_scores import defend
pad_ft_scores.CHUNK = 8
defend(Path({folder!r}), delay=0.02)
"""


def test_a_killed_run_goes_on_to_the_same_selection(tmp_path: Path) -> None:
    folder = tmp_path / "scores"
    script = KILLED.format(folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while not (folder / "scores-000001.npz").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()  # SIGKILL
    process.wait()
    assert 2 <= len(list(folder.glob("scores-*.npz"))) < 8
    assert json.loads((folder / "manifest.json").read_text())["samples"] == 64

    threads = torch.get_num_threads()
    resumed, straight = defend(folder, 0), defend(None, 0)
    torch.set_num_threads(threads)
    assert torch.equal(resumed.selected, straight.selected)
    assert torch.equal(resumed.scores, straight.scores)
    assert len(list(folder.glob("scores-*.npz"))) == 8
    state = straight.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())
