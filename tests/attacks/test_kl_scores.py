"""Scores of a data set: what they are, and that batches, kills and lack of memory do not change them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bdfast import models
from bdfast.attacks import KLScoreConfig, kl_parity, kl_scores, masked_pgd
from bdfast.attacks import kl_scores as _function
from bdfast.errors import LabelRangeError
from bdfast.ops import kl_divergence
from bdfast.runtime import FrozenModel, ScoreTable

MODULE = sys.modules[_function.__module__]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return x, torch.arange(n) % 10


def network() -> nn.Module:
    """With statistics of batch norm that belong to the images and a head that is sure of itself."""
    model = models.build("digits_cnn", num_classes=10, image_size=8, seed=0).train()
    with torch.no_grad():
        model.linear.weight *= 50
        for _ in range(20):
            model(images()[0] / 255)
    return model.eval()


def same(a: ScoreTable, b: ScoreTable) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.scores, b.scores)


def test_scores_are_those_of_one_batch_by_hand() -> None:
    x, labels = images()
    model = network()
    table = kl_scores(model, (x, labels), KLScoreConfig(steps=3, seed=2, round=1))
    with FrozenModel(model) as frozen:
        moved = masked_pgd(frozen, x / 255, radius=2, steps=3, seed=2, round=1)
        clean = frozen.logits(x / 255)
        expected = kl_divergence(clean, frozen.logits(moved))
    torch.testing.assert_close(table.scores, expected, rtol=1e-4, atol=1e-7)
    assert float(table.scores.std()) > 1e-4
    assert torch.equal(table.ids, torch.arange(40))
    assert torch.equal(table.columns["label"], labels)
    assert torch.equal(table.columns["prediction"], clean.argmax(1))
    torch.testing.assert_close(table.columns["confidence"], clean.softmax(1).amax(1))
    assert not table.columns["halved"].any()


@pytest.mark.parametrize("combine", ["mean", "median", "min"])
def test_patches_are_rounds_of_their_own(combine: str) -> None:
    data, model = images(12), network()
    single = [kl_scores(model, data, KLScoreConfig(steps=2, round=number)).scores for number in (3, 4, 5)]
    stacked = torch.stack(single)
    expected = {"mean": stacked.mean(0), "median": stacked.median(0).values, "min": stacked.amin(0)}[combine]
    found = kl_scores(model, data, KLScoreConfig(steps=2, patches=3, combine=combine, round=1))  # type: ignore[arg-type]
    torch.testing.assert_close(found.scores, expected)
    assert not torch.equal(single[0], single[1])


def test_cross_entropy_as_the_objective() -> None:
    x, labels = images(12)
    model = network()
    table = kl_scores(model, (x, labels), KLScoreConfig(objective="ce", steps=2))
    with FrozenModel(model) as frozen:
        moved = masked_pgd(frozen, x / 255, radius=2, steps=2, objective="ce", labels=labels)
        expected = kl_divergence(frozen.logits(x / 255), frozen.logits(moved))
    torch.testing.assert_close(table.scores, expected, rtol=1e-4, atol=1e-7)
    labels[7] = 10
    with pytest.raises(LabelRangeError, match=r"kl_scores: `data: labels` expected classes in \[0, 10\), got 10 at"):
        kl_scores(model, (x, labels), KLScoreConfig(objective="ce"))


def test_bfloat16_ranks_alike() -> None:
    data, model = images(), network()
    exact, fast = (kl_scores(model, data, KLScoreConfig(precision=p, rescore=0)) for p in ("fp32", "bf16"))  # type: ignore[arg-type]
    assert torch.equal(exact.columns["confidence"], fast.columns["confidence"])  # forward passes in float32
    ranks = [table.scores.argsort().argsort().double() for table in (exact, fast)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.7  # 0.88; all scores are of one size here
    assert 0.85 < float((fast.scores / exact.scores).median()) < 1.15  # the perturbations are about as strong


def test_the_first_of_the_ranking_are_scored_again_in_float32() -> None:
    data, model = images(), network()
    exact, fast, plain = (
        kl_scores(model, data, KLScoreConfig(precision=p, rescore=r), ids=torch.arange(39, -1, -1))  # type: ignore[arg-type]
        for p, r in (("fp32", 0.1), ("bf16", 0.3), ("bf16", 0))
    )
    again = fast.columns["rescored"]
    assert sorted(fast.ids[again].tolist()) == sorted(plain.top(12).tolist())
    torch.testing.assert_close(fast.scores[again], exact.scores[again], rtol=1e-4, atol=1e-7)
    assert torch.equal(fast.scores[~again], plain.scores[~again])
    assert "rescored" not in exact.columns


def test_parity_with_the_plain_loop() -> None:
    data, model = images(), network()
    for config in (KLScoreConfig(patches=2, combine="min"), KLScoreConfig(objective="ce", steps=3, radius=1)):
        table = kl_scores(model, data, config)
        parity = kl_parity(model, data, table, config, samples=30, share=0.2)
        assert (parity.samples, parity.top, parity.overlap) == (30, 6, 1.0)
        assert parity.max_difference < 1e-4 * float(table.scores.max())
        assert parity.rank_correlation > 0.999


def test_some_ids_have_the_scores_that_they_have_among_all() -> None:
    data, model = images(), network()
    config = KLScoreConfig(steps=2, batch_size=8)
    whole = kl_scores(model, data, config)
    ids = torch.tensor([31, 2, 17, 3])
    some = kl_scores(model, data, config, ids=ids)
    assert torch.equal(some.ids, ids)
    torch.testing.assert_close(some.scores, whole.scores[ids], rtol=1e-4, atol=1e-7)


def test_samples_without_finite_logits_are_in_quarantine() -> None:
    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            bright = x.flatten(1).mean(1, keepdim=True) > 0.99
            return self.linear(x.flatten(1)) / (~bright).float()

    x, labels = images()
    x[11] = 255
    table = kl_scores(Overflows(), (x, labels), KLScoreConfig(steps=2))
    assert table.quarantined.tolist() == [11]
    assert (table.columns["prediction"] < 0).nonzero().flatten().tolist() == [11]
    assert len(table.ranking()) == 39
    assert table.scores[[10, 12]].isfinite().all()


def test_out_of_memory_halves_one_batch_and_marks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = images(), network()
    config = KLScoreConfig(steps=2, batch_size=8)
    expected = kl_scores(model, data, config)
    scorer = MODULE.KLScorer
    plain = scorer._batch

    def scarce(self: object, x: Tensor, labels: Tensor, ids: Tensor) -> dict[str, Tensor]:
        if len(x) > 4 and 18 in ids:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, x, labels, ids)  # type: ignore[no-any-return]

    monkeypatch.setattr(scorer, "_batch", scarce)
    table = kl_scores(model, data, config)
    assert table.columns["halved"].nonzero().flatten().tolist() == list(range(16, 24))
    torch.testing.assert_close(table.scores, expected.scores, rtol=1e-4, atol=1e-7)


def test_checkpoint_is_used_and_that_of_another_run_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "CHUNK", {"cpu": 8})
    data, model = images(), network()
    config = KLScoreConfig(steps=2, batch_size=8)
    told: list[dict[str, object]] = []
    first = kl_scores(model, data, config, checkpoint=tmp_path, callback=told.append)
    assert [record["epoch"] for record in told] == [1, 2, 3, 4, 5]
    (tmp_path / "scores-000002.npz").unlink()
    told.clear()
    assert same(kl_scores(model, data, config, checkpoint=tmp_path, callback=told.append), first)
    assert len(told) == 1
    with pytest.raises(ValueError, match=r"kl_scores: `checkpoint` expected scores of this very run"):
        kl_scores(model, data, KLScoreConfig(steps=3, batch_size=8), checkpoint=tmp_path)


def test_the_size_of_a_batch_is_that_of_the_run_that_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = images(), network()
    monkeypatch.setattr(MODULE, "auto_batch_size", lambda *_: 16)
    first = kl_scores(model, data, KLScoreConfig(steps=1), checkpoint=tmp_path)
    monkeypatch.setattr(MODULE, "auto_batch_size", lambda *_: 32)
    assert same(kl_scores(model, data, KLScoreConfig(steps=1), checkpoint=tmp_path), first)


def resumable(folder: Path | None, data: object) -> ScoreTable:
    """In chunks of 8; the process that is killed calls it, too."""
    torch.set_num_threads(1)
    MODULE.CHUNK = {"cpu": 8}  # type: ignore[attr-defined]
    return kl_scores(network(), data, KLScoreConfig(steps=2, batch_size=4), checkpoint=folder)


KILLED = """
import time
from pathlib import Path
from tests.attacks.test_kl_scores import images, resumable

class Slow(list):
    def __getitem__(self, index):
        time.sleep(0.01)
        return super().__getitem__(index)

from torch.utils.data import Dataset
class Samples(Dataset):
    def __init__(self): self.rows = Slow(zip(*images(64)))
    def __len__(self): return 64
    def __getitem__(self, index): return self.rows[index]

resumable(Path({folder!r}), Samples())
"""


def test_a_killed_run_goes_on_to_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "CHUNK", MODULE.CHUNK)  # put back afterwards
    folder = tmp_path / "scores"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(folder=str(folder))], cwd=Path(__file__).parents[2]
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder / "scores-000001.npz").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(list(folder.glob("scores-*.npz"))) < 8
    resumed, straight = resumable(folder, images(64)), resumable(None, images(64))
    assert same(resumed, straight)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.1 * torch.randn_like(x))  # type: ignore[no-any-return]


def test_a_model_that_draws_in_eval_mode_draws_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a rerun, and in one that goes on from the first chunks; the caller's random numbers are as before."""
    monkeypatch.setitem(sys.modules[_function.__module__].CHUNK, "cpu", 16)
    model, data, config = Noisy(), images(), KLScoreConfig(steps=1, batch_size=8)
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="kl_scores: `model` expected a function of its images, got one that draws"):
        first = kl_scores(model, data, config, checkpoint=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    last = sorted(tmp_path.glob("scores-*.npz"))[-1]
    last.unlink()
    resumed = kl_scores(model, data, config, checkpoint=tmp_path)
    with pytest.warns(UserWarning, match="depend on the size of batches"):
        again = kl_scores(model, data, config)
    assert same(first, resumed)
    assert same(first, again)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"objective": "l2"}, r"`objective` expected one of kl, ce, got 'l2'"),
        ({"combine": "max"}, r"`combine` expected one of mean, median, min"),
        ({"precision": "fp8"}, r"`precision` expected one of fp32, bf16"),
        ({"score_precision": "fp8"}, r"`score_precision` expected one of fp32, bf16"),
        ({"steps": 0}, r"`steps` expected a whole number, at least 1 and below 2\^31, got 0"),
        ({"patches": 1.5}, r"`patches` expected a whole number, at least 1 and below 2\^31, got 1.5"),
        ({"radius": -1}, r"`radius` expected a whole number, at least 0 and below 2\^31, got -1; "),
        ({"seed": 2**31}, r"`seed` expected a whole number, at least 0 and below 2\^31, got 2147483648; "),
        ({"batch_size": 0}, r"`batch_size` expected a whole number, at least 1 and below 2\^31, got 0"),
        ({"eps": 8}, r"`eps` expected a number in \(0, 1\], got 8"),
        ({"rescore": 1.5}, r"`rescore` expected a number in \[0, 1\], got 1.5; pass the share"),
        ({"step_size": True}, r"`step_size` expected a number in \(0, 1\], got True"),
    ],
)
def test_config_errors(options: dict[str, object], pattern: str) -> None:
    with pytest.raises(ValueError, match="KLScoreConfig: " + pattern):
        KLScoreConfig(**options)  # type: ignore[arg-type]


def test_a_flag_that_is_none() -> None:
    with pytest.raises(TypeError, match="KLScoreConfig: `compile` expected True or False, got 3; pass a bool"):
        KLScoreConfig(compile=3)  # type: ignore[arg-type]


def test_argument_errors() -> None:
    data, model = images(), network()
    with pytest.raises(TypeError, match=r"kl_scores: `config` expected a KLScoreConfig, got dict"):
        kl_scores(model, data, {})  # type: ignore[arg-type]
    for ids in (torch.tensor([0, 40]), torch.tensor([1, 1]), torch.tensor([0.0]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"kl_scores: `ids` expected int64 \[M\], distinct indices in \[0, 40\)"):
            kl_scores(model, data, ids=ids)


def test_radius_of_the_images() -> None:
    assert KLScoreConfig().radius_of(32, 64) == 8
    assert KLScoreConfig(radius=3).radius_of(32, 64) == 3
