"""``bdfast defend gic``, ``gic+<purifier>`` and ``--auxiliary``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdfast.cli.defenses import DEFENSES, PURIFIERS
from bdfast.cli.gic import joined_config
from bdfast.cli.inputs import CONDITIONS
from bdfast.data import load_calibrated
from bdfast.defenses import D3Config, FineTuneConfig, GICConfig
from bdfast.runtime.checkpoints import load_state
from tests.cli.conftest import Outcome, names

Run = Callable[..., Outcome]
FEW = ["--reserve", "40", "--report", "none"]


def test_calibrated_set(bdfast: Run, attack_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "noise_vp" / "badnets"
    words = ["--attack-dir", attack_dir, "--auxiliary", "noise", "--set", "steps=3", "--set", "mix=0.5"]
    outcome = bdfast("defend", "gic", *words, "--reserve", "40", "--out", out)
    assert outcome.code == 0, outcome.err
    assert "40 images calibrated, 20 originals added" in outcome.out
    assert "imprint: " in outcome.out
    assert names(out) == [
        "config.json", "ids.npy", "images.npy", "labels.npy", "manifest.json", "report.html", "result.json",
    ]  # fmt: skip
    assert np.load(out / "images.npy").shape == (60, 8, 8, 1)
    found = load_calibrated(out)
    assert found.about["config"]["steps"] == 3
    assert json.loads((out / "config.json").read_text())["auxiliary"] == "noise"
    repeated = bdfast("defend", "gic", "--config", out / "config.json", "--report", "none", "--out", tmp_path / "again")
    assert repeated.code == 0, repeated.err
    assert torch.equal(load_calibrated(tmp_path / "again").images, found.images)

    purified = bdfast(
        "defend", "ft", "--attack-dir", attack_dir, *FEW, "--set", "epochs=1", "--auxiliary", out,
        "--out", tmp_path / "ft",
    )  # fmt: skip
    assert purified.code == 0, purified.err


def test_gic_and_purifier_in_one(bdfast: Run, attack_dir: Path, tmp_path: Path) -> None:
    words = ["--attack-dir", attack_dir, "--auxiliary", "blur", *FEW, "--set", "gic_steps=2", "--set", "epochs=1"]
    outcome = bdfast("defend", "gic+d3", *words, "--out", tmp_path / "both")
    assert outcome.code == 0, outcome.err
    settings = json.loads((tmp_path / "both" / "config.json").read_text())
    assert (settings["command"], settings["gic_steps"], settings["lam"]) == ("defend gic+d3", 2, 10.0)
    assert (settings["batch_size"], settings["gic_batch_size"]) == (32, 256)
    result = json.loads((tmp_path / "both" / "result.json").read_text())
    assert (result["gic"]["config"]["steps"], result["purifier"]["config"]["epochs"]) == (2, 1)
    assert names(tmp_path / "both") == [
        "config.json",
        "metrics.json",
        "model.safetensors",
        "result.json",
        "results.csv",
    ]

    calibrated = ["defend", "gic", "--attack-dir", attack_dir, "--auxiliary", "blur", *FEW, "--set", "steps=2"]
    assert bdfast(*calibrated, "--out", tmp_path / "set").code == 0
    words = ["defend", "d3", "--attack-dir", attack_dir, *FEW, "--set", "epochs=1", "--auxiliary", tmp_path / "set"]
    assert bdfast(*words, "--out", tmp_path / "steps").code == 0
    one, two = (load_state(tmp_path / name / "model.safetensors").state for name in ("both", "steps"))
    assert all(torch.equal(one[key], two[key]) for key in one)

    repeated = bdfast("defend", "gic+d3", "--config", tmp_path / "both" / "config.json", "--out", tmp_path / "again")
    assert repeated.code == 0, repeated.err


def test_every_purifier_has_a_calibrated_twin() -> None:
    known = {defense.name: defense for defense in DEFENSES}
    assert {"d3", "ft", "ft-sam"} <= {defense.name for defense in PURIFIERS}
    for purifier in PURIFIERS:
        twin = known[f"gic+{purifier.name}"]
        config = twin.config()
        assert config.purifier == purifier.config()
        assert config.gic == GICConfig()


def test_joined_config() -> None:
    both: Any = joined_config(D3Config)
    config = both(preset="release", gic_p=float("inf"), seed=5)
    assert (config.lam, config.gic_p) == (0.5, "inf")  # as they run
    assert config.gic.seed == config.purifier.seed == 5
    assert (both.for_digits().batch_size, both.for_digits().gic_w_bn) == (32, 1.0)
    plain: Any = joined_config(FineTuneConfig)
    assert plain.for_digits(epochs=3) == plain(gic_w_bn=1.0, epochs=3)
    assert len(fields(both)) == len(fields(D3Config)) + len(fields(GICConfig)) - 2
    with pytest.raises(ValueError, match="GICConfig: `delta` expected a finite number > 0"):
        both(gic_delta=0)
    with pytest.raises(ValueError, match="D3Config: `lr`"):
        both(lr=0)


def test_external_data_has_to_fit(bdfast: Run, attack_dir: Path, tmp_path: Path) -> None:
    assert CONDITIONS == ("brightness", "contrast", "colour", "blur", "rotation", "noise")
    images, labels = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 10
    np.savez(tmp_path / "rgb.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    words = ["defend", "ft", "--attack-dir", attack_dir, *FEW, "--set", "epochs=1", "--out", tmp_path / "out"]
    outcome = bdfast(*words, "--auxiliary", tmp_path / "rgb.npz", "--reserve", "20")
    assert outcome.code == 2
    assert "`--auxiliary` expected images [1, 8, 8] of 10 classes, got [3, 8, 8] with labels up to" in outcome.err
    gray = images[..., :1]
    np.savez(tmp_path / "gray.npz", train_images=gray, train_labels=labels, test_images=gray, test_labels=labels)
    assert bdfast(*words, "--auxiliary", tmp_path / "gray.npz", "--reserve", "0.5").code == 0
    missing = bdfast(*words, "--auxiliary", "fog")
    assert missing.code == 2
    assert "`--auxiliary` expected one of brightness, contrast" in missing.err
