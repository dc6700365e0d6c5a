"""What a run continues from is the user's own: nothing that lies in a record, or in the folder of an attack."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bdfast.cli.commands import defend, score
from bdfast.cli.outputs import results_folder
from bdfast.cli.state import make_state_folder, state_folder, state_root
from bdfast.runtime.checkpoints import load_state
from tests.cli.conftest import Outcome, names, save_digits_record
from tests.cli.test_interrupts import ADVRBD, lines_until, start

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes of files")

Run = Callable[..., Outcome]
FEW = ["--limit=200,80", "--report=none"]
FT = ["defend", "ft", *FEW, "--set=epochs=3", "--set=augment=none", "--record", "--attack-dir"]
COMMANDS: dict[str, tuple[list[str], list[str]]] = {  # command, names of what it keeps
    "ft": (["defend", "ft", "--set=epochs=1"], ["resume.pt"]),
    "pad-ft": (["defend", "pad-ft", "--set=epochs=1", "--set=clip_epochs=1"], ["resume.scores"]),
    "advrbd": (["defend", "advrbd", *ADVRBD], ["resume.stages"]),
    "gic": (["defend", "gic", "--set=steps=1"], ["resume.gic"]),
    "gic+d3": (["defend", "gic+d3", "--set=gic_steps=1", "--set=epochs=1"], ["resume.gic", "resume.pt"]),
    "score": (["score", "sce"], [score.KEPT]),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_digits_record(tmp_path_factory.mktemp("bench") / "record" / "x")


@pytest.fixture
def record(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "record" / "x"))


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty before each test."""
    monkeypatch.setenv("BDFAST_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def interrupted(monkeypatch: pytest.MonkeyPatch, bdfast: Run, *words: object) -> Outcome:
    """Ctrl-C when the training is done and nothing is written."""
    with monkeypatch.context() as patch:
        patch.setattr(defend, "write_results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        outcome = bdfast(*words)
    assert outcome.code == 130, outcome.err
    return outcome


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_state(folder / "model.safetensors").state


def same(one: Path, two: Path) -> bool:
    first, second = weights(one), weights(two)
    return all(first[key].equal(second[key]) for key in second)


def test_planted_weights_are_not_continued_from(
    record: Path, sound: Path, state: Path, bdfast: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state of this very run, as its maker can compute it, but for the weights."""
    straight = Path(shutil.copytree(sound, tmp_path / "straight"))
    assert bdfast(*FT, straight).code == 0
    interrupted(monkeypatch, bdfast, *FT, record)
    (own,) = state.iterdir()
    content: dict[str, Any] = torch.load(own / "resume.pt")
    content["model"] = {key: torch.zeros_like(value) for key, value in content["model"].items()}
    shutil.rmtree(own)
    planted = record / "defense" / "ft" / "resume.pt"
    planted.parent.mkdir(parents=True)
    torch.save(content, planted)
    before = planted.read_bytes()
    outcome = bdfast(*FT, record)
    assert outcome.code == 0, outcome.err
    assert "continuing" not in outcome.err
    assert f"note: not continued from, and left as it is: {planted}; this run keeps {own}" in outcome.err
    assert same(record / "defense" / "ft", straight / "defense" / "ft")
    assert planted.read_bytes() == before
    assert names(state) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["record", "attack"])
def test_nothing_in_a_strangers_folder_is_continued_from(
    command: str, kind: str, record: Path, attack_dir: Path, state: Path, bdfast: Run, tmp_path: Path
) -> None:
    folder = record if kind == "record" else Path(shutil.copytree(attack_dir, tmp_path / "attack"))
    words, kept = COMMANDS[command]
    out = folder / "defense" / "mine"
    for name in kept:
        if name == "resume.pt":
            out.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(b"planted")
            continue
        (out / name).mkdir(parents=True)
        for file in ("manifest.json", "run.txt", "fit.pt"):
            (out / name / file).write_bytes(b"planted")
    outcome = bdfast(*words, *FEW, "--attack-dir", folder, "--out", out)
    assert outcome.code == 0, outcome.err
    assert "continuing" not in outcome.err
    assert {*kept, "config.json"} <= set(names(out))
    files = [path for name in kept for path in [out / name, *(out / name).glob("*")] if path.is_file()]
    assert {path.read_bytes() for path in files} == {b"planted"}
    assert names(state) == []


def test_the_same_command_goes_on(
    record: Path, sound: Path, state: Path, bdfast: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = Path(shutil.copytree(sound, tmp_path / "straight"))
    assert bdfast(*FT, straight).code == 0
    outcome = interrupted(monkeypatch, bdfast, *FT, record)
    (own,) = state.iterdir()
    assert f"the same command goes on where it stopped ({own / 'resume.pt'})" in outcome.err
    assert not (record / "defense" / "ft").exists()
    assert [path.stat().st_mode & 0o777 for path in (state, own)] == [0o700, 0o700]
    monkeypatch.chdir(record.parent)
    again = bdfast(*FT, record.name)  # the same folder by another name
    assert again.code == 0, again.err
    assert f"continuing from {own / 'resume.pt'}" in again.err
    assert names(state) == []
    assert same(record / "defense" / "ft", straight / "defense" / "ft")
    assert names(record / "defense" / "ft") == names(straight / "defense" / "ft")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_run_goes_on(record: Path, sound: Path, state: Path, bdfast: Run, tmp_path: Path) -> None:
    words = [*FT, record]
    words[words.index("--set=epochs=3")] = "--set=epochs=30"
    process = start(*words)
    lines_until(process, "ft 3/30")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (own,) = state.iterdir()
    assert "resume.pt" in names(own)
    (own / ".resume.pt.0123456789abcdef.tmp").write_bytes(b"half")  # of a write that was under way
    again = bdfast(*words)
    assert again.code == 0, again.err
    assert f"continuing from {own / 'resume.pt'}" in again.err
    straight = Path(shutil.copytree(sound, tmp_path / "straight"))
    assert bdfast(*words[:-1], straight).code == 0
    assert same(record / "defense" / "ft", straight / "defense" / "ft")
    assert names(state) == []


def test_a_folder_of_ones_own_is_as_it_was(attack_dir: Path, state: Path, tmp_path: Path) -> None:
    assert state_folder(tmp_path / "out", attack_dir) == tmp_path / "out"
    assert state_folder(tmp_path / "out", None) == tmp_path / "out"
    assert state_folder("out", attack_dir) == Path("out")
    assert not state.exists()


def test_links_lead_to_the_same_state(record: Path, state: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(record)
    inside = state_folder(record / "defense" / "ft", record)
    assert inside.parent == state
    for out, foreign in ((tmp_path / "link" / "defense" / "ft", record), (record / "defense/../defense/ft", tmp_path)):
        assert state_folder(out, foreign) == inside
    assert state_folder(record / "defense" / "ft", tmp_path / "link") == inside
    assert state_folder(record / "defense" / "d3", record) != inside


@pytest.mark.parametrize("command", [["defend", "ft", "--record"], ["score", "sce", "--out"]], ids=["defend", "score"])
def test_results_go_through_no_link_of_a_record(record: Path, bdfast: Run, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    (record / "defense").symlink_to(tmp_path / "elsewhere")
    place = [record / "defense" / "sce"] if command[0] == "score" else []
    outcome = bdfast(*command, *place, *FEW, "--attack-dir", record)
    assert outcome.code == 2
    assert f"`{record / 'defense'}` expected a file or folder inside {record}, got a link; remove it" in outcome.err
    assert names(tmp_path / "elsewhere") == []


def test_place_of_the_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for variable, xdg, expected in (
        ("", "", tmp_path / ".local" / "state" / "bdfast"),
        ("", "relative", tmp_path / ".local" / "state" / "bdfast"),  # which the specification says to ignore
        ("", "/var/xdg", Path("/var/xdg/bdfast")),
        ("/scratch/me", "/var/xdg", Path("/scratch/me")),
        ("here", "", tmp_path / "here"),
    ):
        monkeypatch.setenv("BDFAST_STATE", variable)
        monkeypatch.setenv("XDG_STATE_HOME", xdg)
        assert state_root() == expected


@pytest.mark.parametrize("kind", ["link", "writable", "file"])
def test_a_state_that_others_can_write_to(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "state" / "0123"
    (tmp_path / "state").mkdir()
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "resume.pt").write_text("1")
    if kind == "link":
        place.symlink_to(tmp_path / "planted")
    elif kind == "file":
        place.write_text("")
    else:
        place.mkdir()
        place.chmod(0o777)
    with pytest.raises(ValueError, match=r"^test: .*(or set BDFAST_STATE|set it to a folder)"):
        make_state_folder("test", place)
    with pytest.raises(ValueError, match="expected"), results_folder("test", tmp_path / "out", kept=(place / "a",)):
        pass
    assert names(tmp_path) == ["planted", "state"]
    assert names(tmp_path / "planted") == ["resume.pt"]
    assert os.path.lexists(place)


def test_no_place_for_the_state(record: Path, bdfast: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BDFAST_STATE", str(tmp_path / "file"))
    outcome = bdfast(*FT, record)
    assert outcome.code == 2
    assert "`BDFAST_STATE` expected a place for the state of unfinished runs, got " in outcome.err
    assert outcome.err.rstrip().endswith("; set it to a folder of your own")
