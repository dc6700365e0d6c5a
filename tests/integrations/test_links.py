"""Links in a record never choose where we write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bdfast.files import refuse_links
from bdfast.integrations.backdoorbench import load_record, write_defense_result
from tests.integrations.conftest import Attack, assert_same

pytestmark = pytest.mark.skipif(os.name != "posix", reason="symbolic links")
STATE = {"w": torch.ones(1)}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("link", ["defense", "defense/ft", "defense/ft/log", "defense/ft/checkpoint"])
def test_defense_results(tmp_path: Path, elsewhere: Path, link: str) -> None:
    place = tmp_path / "record" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(elsewhere)
    with pytest.raises(
        ValueError, match=rf"^write_defense_result: `{place}` expected a file or folder inside .*a link;"
    ):
        write_defense_result(
            tmp_path / "record", "ft", STATE, model_name="digits_cnn", num_classes=10, index=torch.tensor([1])
        )
    assert os.listdir(elsewhere) == []


@pytest.mark.parametrize("link", ["bd_train_dataset", "bd_test_dataset", "bd_train_dataset/0"])
def test_images_of_a_record(attack: Attack, tmp_path: Path, elsewhere: Path, link: str) -> None:
    place = tmp_path / "record" / "x" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=rf"^write_record: `{place}` expected .*, got a link; remove it"):
        attack.save(tmp_path / "record" / "x")
    assert os.listdir(elsewhere) == []


def test_files_that_are_links_are_replaced(attack: Attack, tmp_path: Path, elsewhere: Path) -> None:
    (elsewhere / "mine").write_text("mine")
    folder = attack.save(tmp_path / "record" / "x")
    files = [next(folder.glob("bd_train_dataset/*/*.png")), folder / "attack_result.pt", folder / "info.pickle"]
    for file in files:
        file.unlink()
        file.symlink_to(elsewhere / "mine")
    attack.save(folder)
    assert not any(file.is_symlink() for file in files)
    assert (elsewhere / "mine").read_text() == "mine"
    assert os.listdir(elsewhere) == ["mine"]
    assert_same(load_record(folder, train=attack.train, test=attack.test), attack)
    assert not list(folder.rglob("*.tmp"))


def test_what_leads_to_the_record_may_be_a_link(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "record").symlink_to(elsewhere)
    out = write_defense_result(tmp_path / "record", "ft", STATE, model_name="digits_cnn", num_classes=10)
    assert (elsewhere / "defense" / "ft" / "defense_result.pt").is_file()
    assert out == tmp_path / "record" / "defense" / "ft"


def test_every_way_to_name_a_path(tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "record"
    (record / "defense").mkdir(parents=True)
    (record / "defense" / "ft").symlink_to(elsewhere)
    (record / "here").symlink_to(".")
    (tmp_path / "name").symlink_to(record)
    monkeypatch.chdir(tmp_path)
    for root in (record, Path("record"), Path("name")):
        for path in ("record/defense/ft", "name/defense/ft/log", tmp_path / "record/here/defense", "record/./here"):
            with pytest.raises(ValueError, match=r"^x: .* got a link"):
                refuse_links("x", root, path)
        for path in ("record/defense/d3", "name/defense", "elsewhere/ft", "record", "name"):
            refuse_links("x", root, path)
