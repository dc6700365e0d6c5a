"""Ctrl-C: one line, exit code 130, no half of a result, and the same command goes on to the same result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bdfast.cli.commands import score
from bdfast.cli.outputs import results_folder
from bdfast.runtime.checkpoints import load_state
from tests.cli.conftest import Outcome, names

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

Run = Callable[..., Outcome]
ROOT = Path(__file__).parents[2]
MINUTES = 300  # seconds until a test gives up; machines may be busy
ADVRBD = [
    f"--set={item}"
    for item in ("warm_up_epochs=2", "enhance_epochs=1", "rounds=1", "epochs=2", "steps=1", "min_per_class=3")
]


def start(*words: object) -> subprocess.Popen[str]:
    """The command in a process of its own, as a terminal starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "bdfast", *map(str, words)], env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def press(process: subprocess.Popen[str]) -> None:
    """Ctrl-C, which reaches the command and whatever it has started."""
    os.killpg(process.pid, signal.SIGINT)


def lines_until(process: subprocess.Popen[str], beginning: str) -> list[str]:
    """What the command says until it says that."""
    assert process.stderr is not None
    lines: list[str] = []
    for line in iter(process.stderr.readline, ""):
        lines.append(line)
        if line.startswith(beginning):
            return lines
    raise AssertionError("".join(lines))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + MINUTES
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def ended(process: subprocess.Popen[str]) -> str:
    """The one line of an interrupted command."""
    out, err = process.communicate(timeout=MINUTES)
    assert process.returncode == 130, err
    assert out == ""
    said = err.strip().splitlines()
    assert "Traceback" not in err
    assert [line for line in said if line.startswith("interrupted: ")] == said[-1:]
    return said[-1]


@pytest.mark.parametrize(
    ("command", "moment", "kept"),
    [
        (["attack", "--limit=200,80", "--set=epochs=6"], "victim 2/6", "resume.pt"),
        (["defend", "d3", "--set=epochs=30"], "d3 3/30", "resume.pt"),
        (["defend", "advrbd", *ADVRBD], "advrbd 1/5", "resume.stages"),
        (["defend", "advrbd", *ADVRBD], "advrbd 4/5", "resume.stages"),
    ],
)
def test_training_goes_on_to_the_same_result(
    bdfast: Run, attack_dir: Path, tmp_path: Path, command: list[str], moment: str, kept: str
) -> None:
    words = [*command, *(["--attack-dir", attack_dir, "--report=none"] if command[0] == "defend" else []), "--out"]
    out = tmp_path / "out"
    process = start(*words, out)
    lines_until(process, moment)
    press(process)
    assert ended(process) == (
        f"interrupted: no result was written to {out}; the same command goes on where it stopped ({out / kept})"
    )
    assert names(out) == [kept]

    again = bdfast(*words, out)
    assert again.code == 0, again.err
    assert f"continuing from {out / kept}" in again.err
    assert kept not in names(out)
    assert bdfast(*words, tmp_path / "straight").code == 0
    assert names(out) == names(tmp_path / "straight")
    one, two = (load_state(folder / "model.safetensors").state for folder in (out, tmp_path / "straight"))
    assert all(one[key].equal(two[key]) for key in two)


@pytest.mark.parametrize("command", [["attack"], ["defend", "d3"], ["score", "sce"]])
def test_while_data_are_read_or_scored(attack_dir: Path, tmp_path: Path, command: list[str]) -> None:
    """As soon as there is a folder for results; what is kept by then is not half of anything."""
    out = tmp_path / "out"
    process = start(*command, *([] if command == ["attack"] else ["--attack-dir", attack_dir]), "--out", out)
    wait_for(lambda: any(out.glob(".unfinished-*")))
    press(process)
    assert ended(process).startswith(f"interrupted: no result was written to {out}")
    assert not out.exists() or set(names(out)) <= {"resume.pt", score.KEPT}


def test_scores_go_on_to_the_same_table(
    bdfast: Run, attack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["score", "sce", "--attack-dir", attack_dir, "--report=none", "--out"]
    monkeypatch.setattr(score, "summarise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    outcome = bdfast(*words, tmp_path / "out")
    assert outcome.code == 130
    assert f"the same command goes on where it stopped ({tmp_path / 'out' / score.KEPT})" in outcome.err
    monkeypatch.undo()
    assert bdfast(*words, tmp_path / "out").code == 0
    assert bdfast(*words, tmp_path / "straight").code == 0
    assert names(tmp_path / "out") == names(tmp_path / "straight")
    assert (tmp_path / "out" / "scores.csv").read_bytes() == (tmp_path / "straight" / "scores.csv").read_bytes()


def test_a_second_time_while_the_process_ends(tmp_path: Path) -> None:
    """Python takes a second to take itself apart, in which it would print a traceback or end by the signal."""
    process = start("attack", "--limit=200,80", "--set=epochs=100", "--out", tmp_path / "out")
    lines_until(process, "victim 1/100")
    press(process)
    lines_until(process, "interrupted: ")
    press(process)
    out, err = process.communicate(timeout=MINUTES)
    assert (process.returncode, out, err) == (130, "", "")


def test_once_the_results_are_printed_the_command_is_done(attack_dir: Path, tmp_path: Path) -> None:
    process = start("score", "sce", "--attack-dir", attack_dir, "--report=none", "--out", tmp_path / "out")
    assert process.stdout is not None
    for line in iter(process.stdout.readline, ""):
        if line.startswith("results in"):
            break
    time.sleep(0.05)  # flushed, but perhaps not returned
    press(process)
    process.communicate(timeout=MINUTES)
    assert process.returncode in (0, 130)
    assert "scores.csv" in names(tmp_path / "out")


def test_inside_exec_of_text_the_exit_code_is_130_too(tmp_path: Path) -> None:
    """Where a text was being run, as dataclasses do it, ``python -m`` would end by SIGINT whatever the code is."""
    (tmp_path / "command.py").write_text(
        "import sys\n"
        "from bdfast.cli import program\n"
        "from bdfast.cli.command import Command\n"
        "run = lambda options: exec('raise KeyboardInterrupt')\n"
        "program.COMMANDS = (Command('try', 'summary', 'description', 'example', lambda parser: None, run),)\n"
        "sys.exit(program.main(['try']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run(
        [sys.executable, "-m", "command"], env=environment, capture_output=True, text=True, timeout=MINUTES
    )
    assert (done.returncode, done.stderr) == (130, "\ninterrupted: nothing was written\n")


def write_two(out: Path) -> None:
    with results_folder("test", out, kept=(out / "resume.pt",)) as folder:
        (folder / "one").write_text("1")
        (folder / "two").write_text("2")


@pytest.fixture
def _ctrl_c_raises() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_raises")
def test_while_results_move_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them get there, and what the run could be continued from goes."""
    replace = os.replace

    def interrupted(*paths: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        replace(*paths)

    (tmp_path / "resume.pt").write_text("1")
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the results are in"):
        write_two(tmp_path)
    assert names(tmp_path) == ["one", "two"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_another_defense_keeps_stays(bdfast: Run, attack_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "resume.stages").mkdir()
    (tmp_path / "resume.stages" / "run.txt").write_text("1")
    words = ["defend", "ft", "--attack-dir", attack_dir, "--set=epochs=1", "--report=none", "--out", tmp_path]
    assert bdfast(*words).code == 0
    assert {"model.safetensors", "resume.stages"} <= set(names(tmp_path))
