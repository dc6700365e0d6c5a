"""Where settings come from, which wins, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bdfast.cli.commands import attack
from bdfast.cli.program import build_parser
from bdfast.cli.settings import MAX_CONFIG_BYTES
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]


def plan(*words: object) -> attack.Plan:
    return attack.plan(build_parser().parse_args(["attack", "--out", "unused", *map(str, words)]))


def test_defaults_of_digits_and_of_other_data() -> None:
    digits, cifar = plan(), plan("--data", "cifar10")
    assert (digits.attack.model, digits.train.epochs, digits.train.lr) == ("digits_cnn", 20, 0.1)
    assert (cifar.attack.model, cifar.train.epochs, cifar.train.lr) == ("preact_resnet18", 100, 0.01)
    assert digits.attack.normalize == "0.3053/0.3759"
    assert digits.attack.rate == 0.1


def test_command_line_wins_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 7\nlr: 1e-2\nrate: 0.2\nseed: 5\n")
    chosen = plan("--config", file, "--set", "lr=0.3")
    assert (chosen.train.epochs, chosen.train.lr, chosen.attack.rate) == (7, 0.3, 0.2)
    assert chosen.attack.seed == chosen.train.seed == 5  # one key, every group that has it


def test_last_of_option_and_set_wins() -> None:
    assert plan("--rate", "0.2", "--set", "rate=0.3").attack.rate == 0.3
    assert plan("--set", "rate=0.3", "--rate", "0.2").attack.rate == 0.2


def test_json_needs_no_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"augment": {"crop_padding": 2, "flip": False}}))
    assert plan("--config", file).train.augment.crop_padding == 2  # type: ignore[union-attr]


def test_options_of_the_named_attack() -> None:
    assert plan("--attack", "blended", "--set", "alpha=0.3").options.alpha == 0.3


def test_resolved_settings_are_a_config(tmp_path: Path) -> None:
    chosen = plan("--set", "alpha=0.5", "--limit", "50,20", "--target", "3", "--set", "epochs=4")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(chosen.record()))
    assert plan("--config", file) == chosen


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--set", "epohcs=3"], ["`--set epohcs`", "did you mean epochs"]),
        (["--set", "zzz=3"], ["known are: alpha,"]),
        (["--set", "epochs=three"], ["`--set epochs` expected a whole number, got 'three'", "default is 100"]),
        (["--set", "epochs=0"], ["`epochs` expected a whole number, at least 1, got 0"]),
        (["--rate", "much"], ["`--rate` expected none, or a number, got 'much'"]),
        (["--rate", "2"], ["`rate` expected a number in [0, 1], got 2.0"]),
        (["--mode", "some"], ["`--mode` expected all-to-one|all-to-all, got 'some'"]),
        (["--attack", "nets"], ["`attack` expected one of ", "badnets, blended", "got 'nets'"]),
        (["--attack", "sig", "--set", "size=3"], ["`--set size`", "name of a setting"]),
        (["--model", "resnet"], ["`name` expected one of digits_cnn", "did you mean 'resnet"]),
        (["--device", "tpu9"], ["`--device` expected a device of this machine, got 'tpu9"]),
        (["--normalize", "0.5/x"], ["`--normalize`", "MEAN/STD"]),
        (["--data", "nowhere.npz"], ["nowhere.npz", "no such file"]),
        (["--config", "nowhere.yaml"], ["`--config` expected a YAML or JSON file, got nowhere.yaml: no such file"]),
    ],
)
def test_wrong_settings(bdfast: Run, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    out = tmp_path / "out"
    outcome = bdfast("attack", "--out", out, *words)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: ")
    assert all(part in outcome.err for part in parts), outcome.err
    assert not out.exists()


LISTS = (f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9))  # one list a billion times
BOMB = "a0: &a0 [1, 1]\n" + "".join(LISTS)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.yaml", "- 1\n", "expected a mapping of names to values"),
        ("a.yaml", "a: [1\n", "expected a YAML or JSON file"),
        ("a.json", "{", "expected a YAML or JSON file"),
        ("a.yaml", "x: !!python/object/apply:os.system ['true']\n", "expected a YAML or JSON file"),
        ("a.yaml", "command: defend d3\n", "run `bdfast defend d3` with it"),
        ("a.yaml", BOMB + "command: *a9\n", "run `bdfast [["),
        ("a.yaml", BOMB + "rate: *a9\n", "rate` expected none, or a number, got [["),
        ("a.yaml", f"command: 0x{'f' * 5000}\n", "those of `a number of 20000 bits`"),
        ("a.yaml", f"seed: 0x{'f' * 5000}\n", "expected a whole number, got a number of 20000 bits"),
        ("a.yaml", f"? 0x{'f' * 5000}\n: 1\n", "expected a mapping of names to values"),
        ("a.yaml", "epohcs: 3\n", "a.yaml: epohcs"),
        ("a.yaml", "# " + "x" * MAX_CONFIG_BYTES, f"at most {MAX_CONFIG_BYTES} bytes"),
    ],
)
def test_wrong_files(bdfast: Run, tmp_path: Path, name: str, content: str, part: str) -> None:
    (tmp_path / name).write_text(content)
    outcome = bdfast("attack", "--out", tmp_path / "out", "--config", tmp_path / name)
    assert outcome.code == 2
    assert part in outcome.err
    assert len(outcome.err) < 4000


def test_set_without_a_value(bdfast: Run) -> None:
    outcome = bdfast("attack", "--out", "unused", "--set", "epochs")
    assert outcome.code == 2
    assert "--set expected NAME=VALUE, got 'epochs'" in outcome.err
