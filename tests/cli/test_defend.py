"""``bdfast defend`` and ``bdfast evaluate``."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bdfast import models
from bdfast.cli.commands import defend
from bdfast.cli.defenses import DEFENSES
from bdfast.runtime.checkpoints import load_state, save_state
from tests.cli.conftest import Outcome, names

Run = Callable[..., Outcome]
FEW = ["--reserve", "40", "--set", "epochs=2"]
RESULTS = ["config.json", "metrics.json", "model.safetensors", "report.html", "result.json", "results.csv"]


@pytest.fixture(scope="module")
def d3_dir(attack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bdfast.cli import main

    out = tmp_path_factory.mktemp("d3")
    assert main(["defend", "d3", "--attack-dir", str(attack_dir), *FEW, "--out", str(out)]) == 0
    return out


def test_results(d3_dir: Path, attack_dir: Path) -> None:
    assert names(d3_dir) == RESULTS
    metrics = json.loads((d3_dir / "metrics.json").read_text())
    assert metrics["before"] == json.loads((attack_dir / "metrics.json").read_text())
    assert 0 <= metrics["DER"] <= 1
    settings = json.loads((d3_dir / "config.json").read_text())
    assert settings["command"] == "defend d3"
    assert (settings["lam"], settings["epochs"], settings["limit"], settings["augment"]) == (10.0, 2, [200, 80], "crop")
    result = json.loads((d3_dir / "result.json").read_text())
    assert [record["epoch"] for record in result["history"]] == [1, 2]
    before, after = (load_state(folder / "model.safetensors") for folder in (attack_dir, d3_dir))
    assert list(before.state) == list(after.state)
    assert before.metadata == after.metadata
    assert not torch.equal(before.state["linear.weight"], after.state["linear.weight"])


def test_csv(d3_dir: Path) -> None:
    with (d3_dir / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = json.loads((d3_dir / "metrics.json").read_text())
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert float(rows[0]["test_asr"]) == metrics["before"]["asr"]
    assert rows[0]["train_loss"] == "nan_value"
    assert rows[1]["test_acc"] == "nan_value"
    assert float(rows[2]["test_acc"]) == metrics["after"]["acc"]
    assert float(rows[2]["distance"]) > 0


def test_report(d3_dir: Path) -> None:
    page = (d3_dir / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.split("base64,")[0]
    assert "<code>digits_cnn</code>" in page


def test_saved_config_repeats_the_run(bdfast: Run, d3_dir: Path, tmp_path: Path) -> None:
    outcome = bdfast("defend", "d3", "--config", d3_dir / "config.json", "--out", tmp_path, "--report", "none")
    assert outcome.code == 0
    assert "report.html" not in names(tmp_path)
    one, two = (load_state(folder / "model.safetensors").state for folder in (d3_dir, tmp_path))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_fine_tune_from_a_bare_checkpoint(bdfast: Run, attack_dir: Path, tmp_path: Path) -> None:
    """Without an attack's folder, the trigger is not known: accuracy alone."""
    state = load_state(attack_dir / "model.safetensors").state
    save_state(tmp_path / "bare.pt", state)
    words = ["--model", tmp_path / "bare.pt", "--limit", "200,80", *FEW, "--out", tmp_path / "ft", "--report", "png"]
    missing = bdfast("defend", "ft", *words)
    assert missing.code == 2
    assert "`--arch` expected the name of an architecture" in missing.err
    outcome = bdfast("defend", "ft", *words, "--arch", "digits_cnn")
    assert outcome.code == 0
    assert outcome.out.splitlines()[1].split()[2:] == ["-", "-", "-"]  # ASR, RA, DER
    metrics = json.loads((tmp_path / "ft" / "metrics.json").read_text())
    assert metrics["after"]["asr"] is None
    assert metrics["DER"] is None
    assert (tmp_path / "ft" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_reserve_as_share_and_as_index_file(
    bdfast: Run, attack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def spy(job: defend.Job) -> object:
        sizes.append(len(provide(job)[1]))
        return provide(job)

    provide = defend.PROVIDERS["reserve"]
    monkeypatch.setitem(defend.PROVIDERS, "reserve", spy)
    (tmp_path / "index.txt").write_text("".join(f"{i}\n" for i in range(30)))
    common = [
        "defend",
        "ft",
        "--attack-dir",
        attack_dir,
        "--set",
        "epochs=1",
        "--report",
        "none",
        "--out",
        tmp_path / "o",
    ]
    for amount in ("0.25", tmp_path / "index.txt"):
        assert bdfast(*common, "--reserve", amount).code == 0
    assert sizes == [50, 30]
    outcome = bdfast(*common, "--reserve", tmp_path / "none.txt")
    assert outcome.code == 2
    assert "none.txt" in outcome.err


def test_interrupt(bdfast: Run, attack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(defend, "write_results", stop)  # after the defense, before its results
    outcome = bdfast("defend", "d3", "--attack-dir", attack_dir, *FEW, "--out", tmp_path / "out")
    assert outcome.code == 130
    assert names(tmp_path / "out") == ["resume.pt"]


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_malicious_checkpoint_is_refused_and_not_run(bdfast: Run, tmp_path: Path) -> None:
    torch.save({"model": Malicious(tmp_path / "owned")}, tmp_path / "bad.pt")
    outcome = bdfast("defend", "d3", "--model", tmp_path / "bad.pt", "--arch", "digits_cnn", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "which may run code" in outcome.err
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_truncated_checkpoint(bdfast: Run, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    save_state(
        file, models.build("digits_cnn", num_classes=10, image_size=8).state_dict(), {"model_name": "digits_cnn"}
    )
    file.write_bytes(file.read_bytes()[:-1000])
    outcome = bdfast("evaluate", "--model", file)
    assert outcome.code == 2
    assert str(file) in outcome.err
    assert "damaged" in outcome.err or "cannot read" in outcome.err


@pytest.mark.parametrize(
    ("break_it", "part"),
    [
        (lambda folder: (folder / "poisoned.npz").unlink(), "no poisoned.npz"),
        (lambda folder: (folder / "config.json").write_text("{"), "a damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "other settings"),
        (lambda folder: (folder / "config.json").write_text('{"command": "defend d3"}'), "other settings"),
        (
            lambda folder: (folder / "config.json").write_text('{"command": "attack", "limit": "x"}'),
            "config.json: limit",
        ),
        (lambda folder: (folder / "poisoned.npz").write_bytes(b"PK"), "PoisonedData.save wrote"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    ],
)
def test_damaged_attack_folder(
    bdfast: Run, attack_dir: Path, tmp_path: Path, break_it: Callable[[Path], object], part: str
) -> None:
    folder = tmp_path / "attack"
    shutil.copytree(attack_dir, folder)
    break_it(folder)
    outcome = bdfast("evaluate", "--attack-dir", folder)
    assert outcome.code == 2
    assert part in outcome.err


def test_other_architecture(bdfast: Run, attack_dir: Path) -> None:
    outcome = bdfast("evaluate", "--attack-dir", attack_dir, "--arch", "preact_resnet18")
    assert outcome.code == 2
    assert "model.safetensors" in outcome.err


@pytest.mark.parametrize("command", ["evaluate", "defend d3", "defend pad-ft", "score sce"])
def test_a_model_of_other_images_than_the_default_ones(bdfast: Run, tmp_path: Path, command: str) -> None:
    colour = models.build("digits_cnn", num_classes=10, image_size=8, channels=3)
    save_state(tmp_path / "colour.safetensors", colour.state_dict(), {"model_name": "digits_cnn"})
    out = [] if command == "evaluate" else ["--out", tmp_path / "out"]
    outcome = bdfast(*command.split(), "--model", tmp_path / "colour.safetensors", *out)
    assert outcome.code == 2
    says = rf"bdfast {command}: `--data` expected images \[3, H, W\], as .*colour.safetensors takes, got \[1, 8, 8\] "
    assert re.search(says + r"\(digits, the default\); pass --data with the data set", outcome.err)
    few = models.build("digits_cnn", num_classes=4, image_size=8)
    save_state(tmp_path / "few.safetensors", few.state_dict(), {"model_name": "digits_cnn"})
    outcome = bdfast(*command.split(), "--model", tmp_path / "few.safetensors", *out)
    assert re.search("`--data` expected at most the 4 classes of .*few.safetensors, got 10 ", outcome.err)


def test_nothing_to_load(bdfast: Run, tmp_path: Path) -> None:
    for words in (["evaluate"], ["defend", "ft", "--out", tmp_path / "out"]):
        outcome = bdfast(*words)
        assert outcome.code == 2
        assert "pass --model FILE or --attack-dir DIR" in outcome.err


def test_evaluate(bdfast: Run, attack_dir: Path, d3_dir: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--model", d3_dir / "model.safetensors", "--attack-dir", attack_dir]
    alone = bdfast(*words)
    assert alone.code == 0
    assert alone.out.split()[:5] == ["ACC", "ASR", "RA", "ASR+target", "ACC-target"]
    compared = bdfast(*words, "--before", attack_dir / "model.safetensors", "--json", "--out", tmp_path / "rates.json")
    content = json.loads(compared.out)
    assert content == json.loads((tmp_path / "rates.json").read_text())
    metrics = json.loads((d3_dir / "metrics.json").read_text())
    assert (content["before"], content["model"]) == (metrics["before"], metrics["after"])
    assert content["DER"] == metrics["DER"]


def test_every_defense_can_be_asked_for_help(bdfast: Run) -> None:
    for defense in DEFENSES:
        assert set(defense.needs) <= set(defend.PROVIDERS)
        outcome = bdfast("defend", defense.name, "--help")
        assert outcome.code == 0
        assert "epochs" in outcome.out
