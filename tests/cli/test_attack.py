"""``bdfast attack``: what it leaves, and what it leaves when it is interrupted."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bdfast.attacks import PoisonedData
from bdfast.cli.commands import attack
from bdfast.runtime.checkpoints import load_state
from tests.cli.conftest import TINY, Outcome, names

Run = Callable[..., Outcome]
RESULTS = ["config.json", "metrics.json", "model.safetensors", "poisoned.npz", "results.csv"]


def test_results(attack_dir: Path) -> None:
    assert names(attack_dir) == RESULTS
    checkpoint = load_state(attack_dir / "model.safetensors")
    assert checkpoint.metadata == {"model_name": "digits_cnn", "num_classes": 10, "normalize": "0.3053/0.3759"}
    assert checkpoint.state["linear.weight"].shape == (10, 64)
    poisoned = PoisonedData.load(attack_dir / "poisoned.npz")
    assert len(poisoned.poison_indices) == 20  # of 200
    metrics = json.loads((attack_dir / "metrics.json").read_text())
    assert metrics["n_clean"] == 80
    assert 0 <= metrics["asr"] + metrics["ra"] <= 1


def test_csv_has_backdoorbench_form(attack_dir: Path) -> None:
    with (attack_dir / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = json.loads((attack_dir / "metrics.json").read_text())
    assert list(rows[0])[:2] == ["", "epoch"]
    assert [row[""] for row in rows] == ["0", "1"]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert rows[0]["test_acc"] == "nan_value"
    assert float(rows[1]["test_acc"]) == metrics["acc"]
    assert float(rows[1]["test_asr"]) == metrics["asr"]
    assert float(rows[1]["test_ra"]) == metrics["ra"]


@pytest.fixture
def _interrupt_second_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting:
        def __init__(self, label: str) -> None:
            pass

        def __call__(self, record: dict[str, object]) -> None:
            if record["epoch"] == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(attack, "Progress", Interrupting)


@pytest.mark.usefixtures("_interrupt_second_epoch")
def test_interrupt_leaves_no_result_and_the_same_command_continues(
    bdfast: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["attack", "--limit", "100,40", "--set", "epochs=3", "--out", out]
    outcome = bdfast(*words)
    assert outcome.code == 130
    assert f"no result was written to {out}" in outcome.err
    assert "the same command goes on" in outcome.err
    assert "Traceback" not in outcome.err
    assert names(out) == ["resume.pt"]

    monkeypatch.undo()
    outcome = bdfast(*words)
    assert outcome.code == 0
    assert "continuing from" in outcome.err
    assert "victim 1/3" not in outcome.err
    assert "victim 3/3" in outcome.err
    assert names(out) == RESULTS

    assert bdfast(*words[:-1], tmp_path / "straight").code == 0
    one, two = (load_state(folder / "model.safetensors").state for folder in (out, tmp_path / "straight"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_interrupt_before_the_first_epoch_leaves_nothing(
    bdfast: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(attack, "make_poison", stop)
    out = tmp_path / "out"
    outcome = bdfast("attack", *TINY, "--out", out)
    assert outcome.code == 130
    assert outcome.err.strip() == f"interrupted: no result was written to {out}"
    assert not out.exists()


def test_failure_keeps_earlier_results(bdfast: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "metrics.json").write_text("earlier")
    monkeypatch.setattr(attack, "write_csv", fail)
    outcome = bdfast("attack", *TINY, "--out", tmp_path)
    assert outcome.code == 2
    assert "error: bdfast: `file` expected room to write, got No space left on device; free some space" in outcome.err
    assert names(tmp_path) == ["metrics.json", "resume.pt"]
    assert (tmp_path / "metrics.json").read_text() == "earlier"


def test_out_is_a_file(bdfast: Run, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    outcome = bdfast("attack", *TINY, "--out", tmp_path / "taken")
    assert outcome.code == 2
    assert "`--out` expected a folder" in outcome.err


def test_own_data_and_architecture(bdfast: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 12, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "photos.npz", train_images=images, train_labels=np.arange(40) % 4,
             test_images=images[:12], test_labels=np.arange(12) % 4)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = ["--data", "photos.npz", "--model", "digits_cnn", "--set", "epochs=1", "--out", "out"]
    assert bdfast("attack", *words).code == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["data"] == str(tmp_path / "photos.npz")
    assert settings["normalize"] == "none"
    monkeypatch.chdir("/")
    assert bdfast("evaluate", "--attack-dir", tmp_path / "out").code == 0


def test_a_preset_sets_rates_and_options_and_gives_way_to_what_is_named(bdfast: Run, tmp_path: Path) -> None:
    words = ["attack", "--limit", "200,80", "--set", "epochs=1", "--attack", "TaCT", "--preset", "advrbd"]
    assert bdfast(*words, "--rate", "0.04", "--set", "cover_classes=5,7", "--out", tmp_path).code == 0
    poisoned = PoisonedData.load(tmp_path / "poisoned.npz")
    assert (len(poisoned.poison_indices), len(poisoned.cover_indices)) == (8, 2)
    assert (poisoned.original_labels[poisoned.is_poisoned] == 0).all()
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["attack"], config["target"], config["source"], config["rate"]) == ("tact", 1, 0, 0.04)
    assert bdfast("attack", "--config", tmp_path / "config.json", "--out", tmp_path / "again").code == 0
    again = PoisonedData.load(tmp_path / "again" / "poisoned.npz")
    assert torch.equal(again.images, poisoned.images)
    outcome = bdfast(*words[:-1], "paper", "--out", tmp_path / "x")
    assert outcome.code == 2
    assert "attacks.preset: `name` expected one of advrbd" in outcome.err


def test_an_image_file_as_trigger(bdfast: Run, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    words = ["attack", *TINY, "--attack", "blended", "--set", f"pattern={tmp_path / 'red.png'}"]
    assert bdfast(*words, "--out", tmp_path / "out").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pattern"] == str(tmp_path / "red.png")
