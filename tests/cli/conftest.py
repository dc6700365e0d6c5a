"""A tiny attack that the tests of the commands share, and a way to run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bdfast import attacks, models
from bdfast.cli import main
from bdfast.data import load
from bdfast.integrations.backdoorbench import save_record

TINY = ["--limit", "200,80", "--set", "epochs=2"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@contextmanager
def one_thread() -> Iterator[None]:
    """Convolutions promise the same bits for the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs keep what they continue from; not the place of whoever runs the tests."""
    root = tmp_path_factory.getbasetemp() / "state"
    monkeypatch.setenv("BDFAST_STATE", str(root))
    return root


@pytest.fixture
def bdfast(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command in this process."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as leave:
            code = int(leave.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def attack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ``bdfast attack``."""
    folder = tmp_path_factory.mktemp("attack") / "badnets"
    with one_thread():
        assert main(["attack", "--out", str(folder), *TINY]) == 0
    return folder


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def save_digits_record(folder: Path) -> Path:
    """A record of an untrained network and 200 digits, of which BadNets poisons a tenth, in ``folder``."""
    train, test, _ = load("digits", limit=(200, 80))
    model = models.build("digits_cnn", num_classes=10, image_size=8, seed=0)
    poisoned = attacks.poison(*train, "badnets", rate=0.1, target=3, num_classes=10)
    save_record(
        folder, model, model_name="digits_cnn", num_classes=10, clean_data="digits",
        train=poisoned, test=poisoned.trigger(*test), in_memory=True,
    )  # fmt: skip
    return folder
