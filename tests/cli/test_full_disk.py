"""A full disk: what was there stays whole, nothing half is left, and the message names the file that the user knows."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bdfast.attacks import PoisonedData, poison
from bdfast.cli.commands import defend, score
from bdfast.cli.outputs import results_folder, write_csv, write_json
from bdfast.data import load_calibrated, save_calibrated, write_index
from bdfast.integrations.backdoorbench import convert, read_artefact, save_record
from bdfast.integrations.backdoorbench.toolbox import save_poison_set
from bdfast.metrics import Metrics
from bdfast.report import Report, write_html, write_png
from bdfast.runtime.checkpoints import load_state, save_state
from bdfast.runtime.score_table import ScoreTable
from bdfast.training import resume
from tests.cli.conftest import TINY, Outcome, names
from tests.cli.test_interrupts import ADVRBD, write_two

resource = pytest.importorskip("resource")

Run = Callable[..., Outcome]
LARGE = 50_000


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more, in the middle of a file, as it does on a full disk."""
    before, (soft, hard) = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def poisoned() -> PoisonedData:
    images = torch.randint(0, 256, (40, 3, 24, 24), dtype=torch.uint8)
    return poison(images, torch.arange(40) % 10, "badnets", rate=0.5, target=0, num_classes=10)


def save_training(path: Path) -> None:
    model = nn.Linear(200, 200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    resume.save(path, "run", [], model, optimizer, schedule, torch.device("cpu"))


REPORT = Report("title", {"before": Metrics(0.9, 1.0), "after": Metrics(0.9, 0.0)})
TABLE = ScoreTable(torch.arange(LARGE), torch.rand(LARGE), {})
WRITERS: dict[str, Callable[[Path], object]] = {
    "x.pt": lambda path: save_state(path, {"a": torch.zeros(LARGE)}),
    "x.safetensors": lambda path: save_state(path, {"a": torch.zeros(LARGE)}),
    "resume.pt": save_training,
    "scores.csv": TABLE.save,
    "scores.npz": TABLE.save,
    "poisoned.npz": lambda path: poisoned().save(path),
    "index.txt": lambda path: write_index(path, torch.arange(LARGE)),
    "metrics.json": lambda path: write_json(path, list(range(LARGE))),
    "results.csv": lambda path: write_csv(path, [{"a": i} for i in range(LARGE)]),
    "report.html": lambda path: write_html(REPORT, path),
    "report.png": lambda path: write_png(REPORT, path),
    "images.npy": lambda path: save_calibrated(path.parent, torch.rand(40, 3, 24, 24), torch.arange(40)),
    "imgs": lambda path: save_poison_set(path.parent, poisoned()),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_earlier_file_stays_whole(name: str, tmp_path: Path) -> None:
    if name.startswith("report"):
        pytest.importorskip("matplotlib.font_manager")  # which may write a cache of its own
    (tmp_path / name).write_text("earlier")
    with files_of_at_most(8192), pytest.raises(OSError, match="File too large") as caught:
        WRITERS[name](tmp_path / name)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / name))
    assert (tmp_path / name).read_text() == "earlier"
    assert names(tmp_path) == [name]


def test_a_calibrated_set_is_what_numpy_writes(tmp_path: Path) -> None:
    images = torch.rand(4, 3, 5, 6)
    save_calibrated(tmp_path, images, torch.arange(4))
    for name in ("images", "labels", "ids"):
        np.save(tmp_path / "plain.npy", np.load(tmp_path / f"{name}.npy"))
        assert (tmp_path / f"{name}.npy").read_bytes() == (tmp_path / "plain.npy").read_bytes()
    assert torch.equal(load_calibrated(tmp_path).images, images)


def test_pictures_of_a_record_are_named(tmp_path: Path) -> None:
    data, model = poisoned(), nn.Linear(2, 2)
    with files_of_at_most(100), pytest.raises(OSError, match="File too large") as caught:
        save_record(
            tmp_path / "record", model, model_name="preactresnet18", num_classes=10, clean_data="cifar10", train=data,
            test=data.trigger(data.images, data.labels),
        )  # fmt: skip
    assert str(caught.value.filename).endswith(".png")
    assert not (tmp_path / "record" / "attack_result.pt").exists()


def test_no_room_for_what_a_foreign_file_holds(tmp_path: Path) -> None:
    """The file is not called damaged: it is the folder of temporary files that is full."""
    torch.save({"w": torch.zeros(LARGE)}, tmp_path / "x.pt")
    with files_of_at_most(8192), pytest.raises(OSError, match="File too large") as caught:
        read_artefact(tmp_path / "x.pt")
    assert caught.value.errno == errno.EFBIG
    assert not isinstance(caught.value, ValueError)
    assert Path(caught.value.filename).is_dir()


def test_attack(bdfast: Run, tmp_path: Path) -> None:
    with files_of_at_most(8192):
        outcome = bdfast("attack", *TINY, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == (
        f"error: bdfast: `{tmp_path / 'out' / 'resume.pt'}` expected a size that is allowed, got File too large; "
        "raise the limit (ulimit -f), or choose a path on another file system"
    )
    assert names(tmp_path) == []


def test_score_then_again_with_room(bdfast: Run, attack_dir: Path, tmp_path: Path) -> None:
    """The report does not fit: nothing of the run appears, and nothing has to be scored again."""
    pytest.importorskip("matplotlib.font_manager")
    words = ["score", "sce", "--attack-dir", attack_dir, "--out", tmp_path]
    (tmp_path / "summary.json").write_text("earlier")
    with files_of_at_most(20_000):
        outcome = bdfast(*words)
    assert outcome.code == 2
    assert f"error: bdfast: `{tmp_path / 'report.html'}` expected" in outcome.err  # not in a folder that is gone
    assert names(tmp_path) == ["summary.json", score.KEPT]
    assert (tmp_path / "summary.json").read_text() == "earlier"
    assert bdfast(*words).code == 0
    assert names(tmp_path) == ["config.json", "report.html", "scores.csv", "summary.json"]


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["advrbd", *ADVRBD], ["resume.stages"]),
        (["pad-ft", "--set=epochs=1", "--set=clip_epochs=1"], ["resume.scores"]),
        (["gic", "--reserve=0.5", "--set=steps=1"], ["resume.gic"]),
        (["gic+d3", "--reserve=0.5", "--set=gic_steps=1", "--set=epochs=1"], ["resume.gic", "resume.pt"]),
    ],
)
def test_a_defense_is_kept_until_its_results_are_written(
    bdfast: Run, attack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], kept: list[str]
) -> None:
    """Hours of training are not lost over the last file."""

    def refuse(kind: str, folder: Path, report: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "report.html"))

    monkeypatch.setattr(defend, "make_report", refuse)
    command = ["defend", *words, "--attack-dir", attack_dir, "--out", tmp_path]
    outcome = bdfast(*command)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith(
        f"error: bdfast: `{tmp_path / 'report.html'}` expected room to write"
    )
    assert names(tmp_path) == kept
    monkeypatch.undo()
    again = bdfast(*command)
    assert again.code == 0, again.err
    assert all(f"continuing from {tmp_path / name}" in again.err for name in kept)
    assert not set(names(tmp_path)) & set(kept)


def test_convert_leaves_the_earlier_record(bdfast: Run, tmp_path: Path) -> None:
    data, model = poisoned(), nn.Linear(2, 2)
    save_record(
        tmp_path / "record", model, model_name="preactresnet18", num_classes=10, clean_data="cifar10", train=data,
        test=data.trigger(data.images, data.labels),
    )  # fmt: skip
    out = tmp_path / "out"
    convert(tmp_path / "record", out)
    before = {name: (out / name).read_bytes() for name in names(out)}
    save_state(tmp_path / "larger.pt", {"a": torch.zeros(LARGE)})
    for file in ("record", "larger.pt"):
        with files_of_at_most(4096):
            assert bdfast("convert", tmp_path / file, out).code == 2
            assert bdfast("convert", tmp_path / file, tmp_path / "new").code == 2
        assert {name: (out / name).read_bytes() for name in names(out)} == before
        assert not (tmp_path / "new").exists()


def test_no_room_for_the_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(prefix: str, dir: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(dir / f"{prefix}x"))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(OSError, match="No space") as caught, results_folder("test", tmp_path / "out"):
        pass
    assert caught.value.filename == str(tmp_path / "out")
    assert names(tmp_path) == []


def test_a_folder_in_the_place_of_a_result(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    with pytest.raises(ValueError, match="two` expected a file to replace, or nothing, got a folder"):
        write_two(tmp_path)
    assert names(tmp_path) == ["two"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output(attack_dir: Path, unbuffered: str) -> None:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    words = [sys.executable, "-m", "bdfast", "evaluate", "--attack-dir", str(attack_dir)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (
        2,
        "error: bdfast: `standard output` expected room to write, got No space left on device; free some space, then "
        "give the same command again\n",
    )


def test_a_reader_that_has_seen_enough(attack_dir: Path) -> None:
    """``bdfast evaluate ... | true``: nothing to complain about."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", "PYTHONPATH": str(Path(__file__).parents[2])
    }  # fmt: skip
    words = [sys.executable, "-m", "bdfast", "evaluate", "--attack-dir", str(attack_dir)]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(words, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_results_can_be_read(bdfast: Run, attack_dir: Path, tmp_path: Path) -> None:
    """What the limit of these tests lets through is whole."""
    with files_of_at_most(1 << 22):
        assert bdfast("defend", "ft", "--attack-dir", attack_dir, "--set=epochs=1", "--out", tmp_path).code == 0
    assert load_state(tmp_path / "model.safetensors").state
