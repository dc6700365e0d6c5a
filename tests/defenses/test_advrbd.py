"""AdvrBD end to end: what it reaches on digits, its edges, and that a killed run goes on to the same result."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bdfast import attacks, metrics, models
from bdfast.data import load
from bdfast.defenses import AdvrBDConfig, AdvrBDResult, advrbd
from bdfast.errors import LabelRangeError

QUICK: dict[str, Any] = {
    "warm_up_epochs": 2, "epochs": 2, "enhance_epochs": 2, "rounds": 2, "steps": 1, "batch_size": 16,
    "content_epochs": 2, "content_networks": 2, "look_epochs": 2, "augment": "none",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Convolutions of 8x8 images are too small to share, and the same number of threads gives the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny() -> nn.Module:
    """Images [1, 3, 4] to 3 classes."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))


def blocks(count: int = 90) -> tuple[Tensor, Tensor]:
    """Three classes, told by which row is bright."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = 0.2 * torch.rand(count, 1, 3, 4, generator=g)
    images[torch.arange(count), 0, labels] += 0.6
    return images, labels


def quick(data: object = None, factory: Any = tiny, **options: Any) -> AdvrBDResult:
    names = ("callback", "ground_truth", "normalize", "checkpoint")
    keep = {name: options.pop(name) for name in names if name in options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="advrbd: the enhanced model")
        warnings.filterwarnings("ignore", message="train_classifier: `data` expected samples of every class")
        return advrbd(factory, blocks() if data is None else data, AdvrBDConfig(**{**QUICK, **options}), **keep)


def fingerprint(result: AdvrBDResult) -> tuple[Any, ...]:
    weights = [p.tolist() for p in result.model.state_dict().values()]
    return result.clean_indices.tolist(), result.dc_indices.tolist(), result.scores.tolist(), weights


# --- what it reaches -------------------------------------------------------------------------------------------------


def digits_run(attack: str, rate: float, **options: Any) -> tuple[AdvrBDResult, metrics.Metrics]:
    train, test, _ = load("digits", seed=0)
    poisoned = attacks.poison(*train, attack, rate=rate, target=0, seed=0)

    def network() -> nn.Module:
        return models.build("digits_cnn", num_classes=10, image_size=8, channels=1)

    fast = {"warm_up_epochs": 12, "epochs": 12, "content_networks": 5, "content_epochs": 7}
    result = advrbd(network, poisoned, AdvrBDConfig.for_digits(**{**fast, **options}))
    return result, metrics.evaluate(result.model, test, poisoned.trigger(*test))


@pytest.mark.parametrize(("attack", "rate"), [("badnets", 0.1), ("blended", 0.05)])
def test_robust_finds_the_poison_of_digits(attack: str, rate: float) -> None:
    result, after = digits_run(attack, rate, preset="robust")
    assert result.quality is not None
    assert result.quality["tpr_relabelled"] > 0.9
    assert after.asr < 0.10
    assert after.acc > 0.90
    assert result.rounds[0]["purity"] == 1.0


def test_with_a_truly_clean_d_c_enhancement_and_identification_work() -> None:
    result, after = digits_run(
        "badnets", 0.1, preset="robust", rank="oracle", content_check=False, vote="majority", looks=0
    )
    assert result.quality is not None
    assert result.quality["tpr_relabelled"] >= 0.97
    assert result.quality["fpr"] <= 0.30
    assert after.asr < 0.10
    assert after.acc > 0.93
    assert result.content is None


def test_kl_scores_tell_badnets_from_clean_samples() -> None:
    result, _ = digits_run("badnets", 0.1, rounds=1, enhance_epochs=1, epochs=1, steps=1, step_size=8 / 255)
    assert result.rounds[0]["auroc"] > 0.6
    assert bool((result.scores >= 0).all())
    assert all(math.isfinite(record["loss"]) for record in result.history)


def noise() -> tuple[Tensor, Tensor]:
    """Images whose content tells nothing of their class."""
    return torch.rand(90, 1, 3, 4, generator=torch.Generator().manual_seed(0)), torch.arange(90) % 3


def test_robust_says_where_content_tells_nothing() -> None:
    with pytest.warns(UserWarning, match="recognise .* % of its samples, and content says little"):
        quick(noise(), preset="robust", keep_dc=True, min_per_class=5)


def test_robust_looks_twice_at_either_half_of_the_suspects() -> None:
    result = quick(preset="robust", look_epochs=1)
    stages = [record["stage"] for record in result.history]
    assert stages[-6:] == ["look 0.0", "look 0.1", "look 1.0", "look 1.1", "clean", "clean"]
    assert result.history[-1]["epoch"] == result.history[-1]["epochs"]
    assert "look" in result.timings


def test_suspects_below_0_are_clean_and_the_others_are_not() -> None:
    result = quick(preset="robust", look_epochs=1, content_check=False)
    assert result.contrast is not None
    assert result.poisoned_indices.tolist() == (result.contrast >= 0).nonzero().flatten().tolist()
    assert 0 < int(result.contrast.isfinite().sum()) < 90
    assert quick().contrast is None


def test_nothing_is_contrasted_where_nothing_is_suspected() -> None:
    result = quick(preset="robust", content_check=False, min_per_class=1000)
    assert [record["stage"] for record in result.history][-3:] == ["enhance 1", "clean", "clean"]
    assert result.history[-1]["epoch"] == result.history[-1]["epochs"]


def test_looks_bring_clean_samples_of_digits_back_and_leave_poison() -> None:
    """The same run without them: a second look costs little poison and brings most of what was lost."""
    options: dict[str, Any] = {"preset": "robust", "rank": "oracle", "content_check": False}
    before, _ = digits_run("badnets", 0.1, **options, looks=0, epochs=1)  # of its model nothing is asked
    after, rates = digits_run("badnets", 0.1, **options, looks=1)
    assert before.quality is not None
    assert after.quality is not None
    assert set(before.clean_indices.tolist()) <= set(after.clean_indices.tolist())
    assert after.quality["fpr"] < 0.5 * before.quality["fpr"]
    assert after.quality["tpr_relabelled"] > before.quality["tpr_relabelled"] - 0.03
    assert rates.asr < 0.10


# --- the result ------------------------------------------------------------------------------------------------------


def test_the_result_holds_split_history_and_json() -> None:
    records: list[dict[str, Any]] = []
    result = quick(callback=records.append, relabel=True, relabel_epochs=1, rank="confidence")
    assert sorted([*result.clean_indices.tolist(), *result.poisoned_indices.tolist()]) == list(range(90))
    assert len(set(result.dc_indices.tolist())) == len(result.dc_indices) == 2 * math.ceil(0.05 * 90)
    assert [r["epoch"] for r in result.history] == list(range(1, len(records) + 1))
    stages = list(dict.fromkeys(r["stage"] for r in result.history))
    assert stages == ["warm_up", "enhance 0", "enhance 1", "clean", *(["relabel"] if result.relabeled_model else [])]
    assert [r["epoch"] for r in records] == [r["epoch"] for r in result.history]
    content = json.loads(result.to_json())
    assert content["clean_indices"] == result.clean_indices.tolist()
    assert content["quality"] is None
    assert "model" not in content
    assert {"setup", "warm_up", "partition", "enhance", "identify", "clean"} <= set(result.timings)


def test_relabelling_is_skipped_where_nothing_is_suspected() -> None:
    result = quick(relabel=True, relabel_epochs=1, min_per_class=1000)
    assert result.relabeled_model is None
    assert len(result.poisoned_indices) == 0


def test_relabelling_leaves_the_clean_model_alone() -> None:
    plain = quick(rank="random")
    result = quick(rank="random", relabel=True, relabel_epochs=1)
    assert result.relabeled_model is not None
    assert len(result.poisoned_indices) > 0
    assert fingerprint(result) == fingerprint(plain)
    same = [torch.equal(a, b) for a, b in zip(
        result.model.state_dict().values(), result.relabeled_model.state_dict().values(), strict=True)]  # fmt: skip
    assert not all(same)


def test_same_seed_same_result_and_the_random_state_of_the_caller_stays() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = quick(preset="robust", seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    torch.manual_seed(6)
    assert fingerprint(first) == fingerprint(quick(preset="robust", seed=1))
    assert fingerprint(first) != fingerprint(quick(preset="robust", seed=2))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_the_default_dtype_changes_no_bit(default: torch.dtype) -> None:
    network, data = tiny(), blocks()

    def run() -> AdvrBDResult:
        return quick(data, preset="robust", factory=lambda: copy.deepcopy(network))

    expected = fingerprint(run())
    torch.set_default_dtype(default)
    try:
        assert fingerprint(run()) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_normalisation_outside_of_the_network_is_that_inside() -> None:
    from bdfast.nn import normalized

    mean, std = (0.3,), (0.5,)
    outside = quick(preset="robust", normalize=(mean, std))
    inside = quick(preset="robust", factory=lambda: normalized(tiny(), mean, std))
    assert torch.equal(outside.clean_indices, inside.clean_indices)


def test_samples_that_cannot_be_scored_are_counted_and_never_chosen() -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.net(images)
            broken = (images.flatten(1)[:, 0] == 1.0) & (not self.training)
            return torch.where(broken[:, None], torch.nan, logits)

    images, labels = blocks()
    images[[4, 7], 0, 0, 0] = 1.0
    for rank in ("kl", "content"):
        result = quick((images, labels), Fragile, rank=rank)
        assert result.nonfinite >= 2 if rank == "content" else result.nonfinite == 2
        assert not {4, 7} & set(result.dc_indices.tolist())
        assert {4, 7} <= set(result.poisoned_indices.tolist())


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"preset": "other"}, ValueError, "`preset` expected one of paper, robust"),
        ({"rank": "loss"}, ValueError, "`rank` expected one of kl, confidence, random, oracle, content"),
        ({"radius": -1}, ValueError, "`radius` expected a whole number of pixels"),
        ({"gamma": 0.0}, ValueError, "`gamma` expected a finite number > 0 and < 1"),
        ({"gamma_of": "some"}, ValueError, "`gamma_of`"),
        ({"rounds": 0}, ValueError, "`rounds` expected a whole number, at least 1"),
        ({"mu": -1.0}, ValueError, "`mu`"),
        ({"tau": 0.0}, ValueError, "`tau`"),
        ({"per_class": 1}, TypeError, "`per_class` expected True or False"),
        ({"min_per_class": -1}, ValueError, "`min_per_class`"),
        ({"looks": -1}, ValueError, "`looks`"),
        ({"content_networks": 1}, ValueError, "`content_networks` expected at least 2"),
        ({"content_seeds": 0.0}, ValueError, "`content_seeds`"),
        ({"content_seeding": "none"}, ValueError, "`content_seeding` expected one of both, energy, neighbors"),
        ({"vote": "any"}, ValueError, "`vote` expected one of last, majority, all"),
        ({"look_weight": 0.0}, ValueError, "`look_weight`"),
        ({"attack": "mse"}, ValueError, "`attack` expected one of kl, ce"),
        ({"precision": "fp16"}, ValueError, "`precision`"),
        ({"augment": "blur"}, ValueError, "`augment`"),
        ({"seed": 2**32}, ValueError, "`seed`"),
        ({"lr": math.nan}, ValueError, "`lr`"),
        ({"epochs": True}, ValueError, "`epochs`"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="AdvrBDConfig: " + text):
        AdvrBDConfig(**options)


def test_the_preset_is_looked_up_and_fields_win() -> None:
    assert (AdvrBDConfig().rank, AdvrBDConfig().mu, AdvrBDConfig().patches) == ("kl", 1.0, 1)
    config = AdvrBDConfig(preset="robust", mu=0.7)
    assert (config.rank, config.mu, config.per_class, config.vote) == ("content", 0.7, True, "all")


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="`model_factory` expected a function that makes a network, got Sequential"):
        quick(factory=tiny())
    with pytest.raises(TypeError, match="`model_factory` expected a function that makes a network, got int"):
        quick(factory=lambda: 3)
    one = tiny()
    with pytest.raises(ValueError, match="`model_factory` expected a new network from every call"):
        quick(factory=lambda: one)
    with pytest.raises(TypeError, match="`config` expected an AdvrBDConfig"):
        advrbd(tiny, blocks(), {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'`ground_truth` expected bool \[N\] for rank="oracle"'):
        quick(rank="oracle")
    with pytest.raises(ValueError, match=r"`ground_truth` expected bool \[90\]"):
        quick(ground_truth=torch.zeros(3).bool())
    images, labels = blocks()
    with pytest.raises(LabelRangeError, match=r"advrbd: `poisoned_data: labels` expected classes in \[0, 3\), got 7"):
        quick((images, torch.where(torch.arange(90) == 8, 7, labels)))
    with pytest.raises(ValueError, match="at least one sample a round"):
        quick(gamma=0.001)
    with pytest.raises(ValueError, match="expected samples of several classes, got of one alone"):
        quick((images, torch.zeros_like(labels)), preset="robust")


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_finished_run_is_read_back_and_another_one_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"preset": "robust", "checkpoint": tmp_path / "run"}
    first = quick(**options)
    records: list[dict[str, Any]] = []
    again = quick(**options, callback=records.append)
    assert fingerprint(again) == fingerprint(first) == fingerprint(quick(preset="robust"))
    assert records == []  # nothing was trained anew
    assert [r["epoch"] for r in again.history] == [r["epoch"] for r in first.history]
    with pytest.raises(ValueError, match="a checkpoint of this very run"):
        quick(**options, seed=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`checkpoint` expected a folder"):
        quick(checkpoint=tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="a folder with other things in it"):
        quick(checkpoint=tmp_path / "other")


@pytest.mark.parametrize("epochs_done", [1, 4, 8, 11])
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path: Path, epochs_done: int) -> None:
    class Stop(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == epochs_done:
            raise Stop

    with pytest.raises(Stop):
        quick(preset="robust", checkpoint=tmp_path / "run", callback=stop)
    assert fingerprint(quick(preset="robust", checkpoint=tmp_path / "run")) == fingerprint(quick(preset="robust"))


@pytest.mark.parametrize("epochs_done", [11, 12, 13])  # in a look, between its halves, and in the other one
def test_a_look_is_taken_up_again(tmp_path: Path, epochs_done: int) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == epochs_done:
            assert record["stage"] == ("look 0.0" if epochs_done < 13 else "look 0.1")
            raise InterruptedError

    options: dict[str, Any] = {"preset": "robust", "look_epochs": 2}
    with pytest.raises(InterruptedError):
        quick(**options, checkpoint=tmp_path / "run", callback=stop)
    assert fingerprint(quick(**options, checkpoint=tmp_path / "run")) == fingerprint(quick(**options))


KILLED = """
import sys, torch
torch.set_num_threads(1)
from tests.defenses.test_advrbd import quick, fingerprint
def report(record):
    print(record["epoch"], flush=True)
result = quick(preset="robust", checkpoint=sys.argv[1], callback=report)
print(fingerprint(result)[:2], flush=True)
"""


def test_a_killed_process_goes_on_to_the_same_split(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    words = [sys.executable, "-c", KILLED, str(tmp_path / "run")]
    with subprocess.Popen(words, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "7":  # in the middle of the rounds
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait() != 0
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    lines = done.strip().splitlines()
    assert lines[0] not in ("1", "7")  # earlier epochs were not repeated
    assert lines[-1] == str(fingerprint(quick(preset="robust"))[:2])


def test_models_come_in_eval_mode_and_a_frozen_factory_is_trained_even_in_inference_mode() -> None:
    def frozen() -> nn.Module:
        return tiny().requires_grad_(False)

    expected = fingerprint(quick(relabel=True, relabel_epochs=1))
    with torch.inference_mode():
        images, labels = blocks()
        result = quick((images, labels), frozen, relabel=True, relabel_epochs=1)
    assert fingerprint(result) == expected
    assert not result.model.training
    assert result.relabeled_model is not None
    assert not result.relabeled_model.training
