"""``bdfast bb``: BackdoorBench's arguments, their precedence, and what is left in the record."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bdfast import attacks, models
from bdfast.cli.commands.bb import base_data
from bdfast.data import load, read_index
from bdfast.integrations.backdoorbench import read_artefact, read_metrics, save_record
from bdfast.integrations.backdoorbench.arguments import merge, translate
from tests.cli.conftest import Outcome
from tests.data.test_cifar_python import cifar10, write

Run = Callable[..., Outcome]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the scripts are started in."""
    train, test, _ = load("digits", limit=(200, 80))
    model = models.build("digits_cnn", num_classes=10, image_size=8, seed=0)
    poisoned = attacks.poison(*train, "badnets", rate=0.1, target=3, num_classes=10)
    save_record(
        tmp_path / "record" / "badnet_0_1", model, model_name="digits_cnn", num_classes=10, clean_data="digits",
        train=poisoned, test=poisoned.trigger(*test), in_memory=True,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    return tmp_path


RATES = ("test_acc", "test_asr", "test_ra")
COMMON = ["--result_file", "badnet_0_1", "--dataset", "digits", "--limit", "200,80"]


def test_run_and_precedence(checkout: Path, bdfast: Run) -> None:
    folder = checkout / "config" / "defense" / "d3"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "device: cpu\npin_memory: True\nepochs: 7\nlr: 0.5\nsgd_momentum: 0.5\nlam: 3\nindex:\nalpha: 1\n"
    )
    (checkout / "exp.yaml").write_text("lr: 0.03125\n")
    outcome = bdfast("bb", "d3", *COMMON, "--epochs", "1", "--lr", "0.25", "--exp_yaml_path", "exp.yaml", "-pm", "1")
    assert outcome.code == 0, outcome.err
    out = checkout / "record" / "badnet_0_1" / "defense" / "d3"
    settings = json.loads((out / "config.json").read_text())
    assert (settings["epochs"], settings["lr"], settings["momentum"], settings["lam"]) == (1, 0.03125, 0.5, 3.0)
    assert (settings["reserve"], settings["draw"], settings["seed"]) == (0.05, "backdoorbench", 0)
    assert "not used by d3: alpha" in outcome.err
    assert read_index(out / "log" / "index.txt").tolist() == [98, 194, 107, 10, 66, 130, 124, 103, 77, 122]
    assert set(read_artefact(out / "defense_result.pt").value) == {"model_name", "num_classes", "model"}
    assert {"d3_df.csv", "d3_df_summary.csv"} <= set(os.listdir(out))


def test_a_defense_without_a_reserve_says_that_ratio_is_not_used(checkout: Path, bdfast: Run) -> None:
    few = ["--set", "k=5", "--set", "clip_epochs=1", "--set", "epochs=1", "--set", "clip_batch_size=50"]
    outcome = bdfast("bb", "pad-ft", *COMMON, *few, "--ratio", "0.1")
    assert outcome.code == 0, outcome.err
    assert "note: not used by pad-ft: ratio" in outcome.err
    saved = json.loads((checkout / "record" / "badnet_0_1" / "defense" / "pad-ft" / "config.json").read_text())
    assert not {"reserve", "draw", "auxiliary"} & set(saved)


def test_index_file_and_set(checkout: Path, bdfast: Run) -> None:
    (checkout / "index.txt").write_text("5\n3\n9\n")
    words = ["--index", "index.txt", "--set", "epochs=1", "--device", "cuda:0,1"]
    outcome = bdfast("bb", "ft", *COMMON, *words)
    assert outcome.code == 0, outcome.err
    index = checkout / "record" / "badnet_0_1" / "defense" / "ft" / "log" / "index.txt"
    assert index.read_text() == "5\n3\n9\n"
    assert "note: " in outcome.err  # one GPU of two, or none


def test_a_table_has_a_row_an_epoch(checkout: Path, bdfast: Run) -> None:
    """It is read by position: what the last row and ``valid_max`` say is of the defended model."""
    assert bdfast("bb", "ft", *COMMON, "--epochs", "3").code == 0
    folder = checkout / "record" / "badnet_0_1" / "defense" / "ft"
    rows = read_metrics(folder / "ft_df.csv")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert [sorted(key for key in row if key.startswith("test_")) for row in rows] == [[], [], [*RATES]]
    assert all({"train_loss", "train_acc", "lr"} <= set(row) for row in rows)
    after = json.loads((folder / "metrics.json").read_text())["after"]
    last, largest, _ = read_metrics(folder / "ft_df_summary.csv")
    for name in RATES:
        assert last[name] == largest[name] == rows[-1][name] == after[name.removeprefix("test_")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "`--result_file` expected the name of a record, got none"),
        (["--result_file", "nowhere"], "no folder record/nowhere"),
        (["--result_file", "badnet_0_1", "--yaml_path", "no.yaml"], "`--yaml_path` expected a YAML file"),
        (["--result_file", "badnet_0_1", "--lr_scheduler", "StepLR"], "`--lr_scheduler` expected CosineAnnealingLR"),
        (["--result_file", "badnet_0_1", "--set", "lam"], "`--set` expected NAME=VALUE"),
        (["--result_file", "badnet_0_1", "--set", "lma=1"], "did you mean"),
        (["--result_file", "badnet_0_1", "--dataset", "mnist"], "mnist"),
    ],
)
def test_errors(words: list[str], says: str, checkout: Path, bdfast: Run) -> None:
    outcome = bdfast("bb", "d3", *words)
    assert outcome.code == 2
    assert says in outcome.err


@pytest.mark.parametrize(
    "text",
    [
        "- 1\n",
        "1: 2\n",
        "a: [\n",
        "x" * (1 << 21),
        "a: &a [*a]\n",
        "a: [[1], 2]\n",
        "a: {b: 1}\n",
        f"lr: 0x{'f' * 5000}\n",
    ],
    ids=["list", "number", "damaged", "large", "itself", "nested", "mapping", "endless number"],
)
def test_broken_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match="`--yaml_path` expected"):
        merge("bb", "d3", {"yaml_path": str(tmp_path / "x.yaml"), "result_file": "x"})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("ratio: abc", "`--ratio` expected a share in"),
        ("ratio: 0", "`--ratio` expected a share in"),
        ("ratio: true", "`--ratio` expected a share in"),
        ("index: 5", "`--index` expected a file of indices, got 5"),
        ("result_file: 5", "`--result_file` expected the name of a record"),
    ],
)
def test_values_of_another_kind(line: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"result_file: x\n{line}\n" if "result" not in line else line)
    with pytest.raises(ValueError, match=says):
        merge("bb", "d3", {"yaml_path": str(tmp_path / "x.yaml")})


def test_a_bomb_of_aliases_ends_at_once(tmp_path: Path) -> None:
    """Nine levels of nine references each: a kilobyte whose text would fill a disk."""
    levels = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
    (tmp_path / "x.yaml").write_text("\n".join([*levels, "lr_scheduler: *a9", "result_file: x"]))
    with pytest.raises(ValueError, match="more below `a1`"):
        merge("bb", "d3", {"yaml_path": str(tmp_path / "x.yaml")})


def test_translate() -> None:
    merged: dict[str, Any] = {"wd": 0.1, "random_seed": 3, "lr": 1.0, "ratio": 0.1, "num_workers": 4, "rho_max": 2.0}
    settings, unused = translate(merged, ["lr", "weight_decay", "seed"])
    assert settings == {"weight_decay": 0.1, "seed": 3, "lr": 1.0, "reserve": 0.1, "draw": "backdoorbench"}
    assert unused == ["rho_max"]
    assert translate({**merged, "index": "i.txt"}, [])[0]["reserve"] == "i.txt"


def test_what_the_scripts_files_say_in_other_words() -> None:
    merged: dict[str, Any] = {"ratio": 0.05, "dataset": "gtsrb", "rho_max": 8.0, "rho_min": 8.0}
    settings, unused = translate(merged, ["rho", "augment"])
    assert (settings["rho"], settings["augment"], unused) == (8.0, {"crop_padding": 4, "flip": False}, [])
    settings, unused = translate({**merged, "dataset": "cifar10", "rho_min": 2.0}, ["rho", "augment"])
    assert settings["augment"]["flip"]
    assert ("rho" in settings, unused) == (False, ["rho_max", "rho_min"])
    assert translate({**merged, "augment": "none"}, ["augment"])[0]["augment"] == "none"
    assert "augment" not in translate({**merged, "dataset": "digits"}, ["augment"])[0]


def test_torchvisions_folder_is_the_base_data(tmp_path: Path) -> None:
    write(tmp_path / "cifar10" / "cifar-10-batches-py", cifar10((2, 1), test=1))
    found = base_data({"dataset": "cifar10", "dataset_path": str(tmp_path)})
    assert found == str(tmp_path / "cifar10")
    train, test, _ = load(found)
    assert (len(train[1]), len(test[1])) == (3, 1)
