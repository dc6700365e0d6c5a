"""Exit codes, messages, and what a pipe receives."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bdfast import __version__, _startup
from bdfast.cli import program
from bdfast.cli.command import Command
from bdfast.cli.commands import evaluate
from bdfast.cli.program import COMMANDS
from tests.cli.conftest import TINY, Outcome, names

Run = Callable[..., Outcome]


def stand_in(monkeypatch: pytest.MonkeyPatch, run: Callable[..., int]) -> None:
    """A command ``try`` in place of all others."""
    command = Command("try", "summary", "description", "  bdfast try", lambda parser: None, run)
    monkeypatch.setattr(program, "COMMANDS", (command,))


def test_version_and_help(bdfast: Run) -> None:
    assert bdfast("--version") == Outcome(0, f"bdfast {__version__}\n", "")
    overview = bdfast("--help")
    assert overview.code == 0
    for command in COMMANDS:
        assert command.name in overview.out
        assert command.summary.split()[0] in overview.out
        page = bdfast(command.name, "--help")
        assert page.code == 0
        assert f"bdfast {command.name}" in page.out
        one = f" 1 {command.finding}," if command.finding else ""
        assert f"\nexit codes: 0 done,{one} 2 failed, 130 interrupted\n" in page.out
        assert max(map(len, page.out.splitlines())) <= 120
    assert "exit codes: 0 done, 1 a finding (doctor and bench), 2 failed, 130 interrupted" in overview.out
    for words in (["defend", "d3"], ["score", "sce"], ["bb", "ft"]):
        assert bdfast(*words, "--help").out.endswith("\nexit codes: 0 done, 2 failed, 130 interrupted\n")


def test_what_may_end_with_1() -> None:
    """Every module that speaks of a finding says so in its help, and no other."""
    speaking = {command.name for command in COMMANDS if "FINDING" in vars(sys.modules[command.run.__module__])}
    assert speaking == {command.name for command in COMMANDS if command.finding} == {"doctor", "bench"}


def test_no_or_unknown_command(bdfast: Run) -> None:
    for words in ([], ["defnd"]):
        outcome = bdfast(*words)
        assert outcome.code == 2
        assert outcome.out == ""
        assert "usage: bdfast" in outcome.err


@pytest.mark.parametrize("code", [0, 1])
def test_exit_code_of_the_command(bdfast: Run, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    stand_in(monkeypatch, lambda options: code)
    assert bdfast("try").code == code


def test_traceback_only_if_asked_for(bdfast: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> int:
        raise RuntimeError("inner trouble")

    stand_in(monkeypatch, fail)
    assert bdfast("try") == Outcome(2, "", "error: RuntimeError: inner trouble\n")
    shown = bdfast("try", "--traceback")
    assert shown.code == 2
    assert "Traceback (most recent call last)" in shown.err


def test_interrupt(bdfast: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(options: object) -> int:
        raise KeyboardInterrupt

    stand_in(monkeypatch, interrupt)
    assert bdfast("try") == Outcome(130, "", "\ninterrupted: nothing was written\n")


def test_warnings_are_one_line(bdfast: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(options: object) -> int:
        warnings.warn("look out", UserWarning, stacklevel=1)
        return 0

    stand_in(monkeypatch, warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert bdfast("try").err == "warning: look out\n"


def test_main_is_the_function() -> None:
    import bdfast.cli

    assert bdfast.cli.main is program.main
    assert evaluate.COMMAND in COMMANDS


def test_pipe_gets_plain_lines(tmp_path: Path) -> None:
    """``python -m bdfast`` away from a terminal: no control characters, progress apart from results."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "bdfast", "attack", *TINY, "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).replace("\n", "").isprintable()
    assert [line.split("  ")[0] for line in done.stderr.splitlines()] == ["victim 1/2", "victim 2/2"]
    assert "ACC" in done.stdout
    assert "victim 1/2" not in done.stdout
    assert "model.safetensors" in names(tmp_path / "out")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "`runs/x` expected room to write, got No space left on device; free some space"),
        (errno.EROFS, "`runs/x` expected a place that can be written, got Read-only file system; choose another path"),
        (errno.EACCES, "`runs/x` expected a path with permission, got Permission denied; choose another path"),
        (errno.EIO, "`runs/x` expected a path that can be used, got Input/output error; check the path"),
    ],
)
def test_what_the_system_refuses(bdfast: Run, monkeypatch: pytest.MonkeyPatch, number: int, text: str) -> None:
    def refuse(_: object) -> int:
        raise OSError(number, os.strerror(number), "runs/x")

    stand_in(monkeypatch, refuse)
    outcome = bdfast("try")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: bdfast: {text}")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("words", "code"), [(("-m", "bdfast", "doctor"), 130), (("-c", "import bdfast"), -signal.SIGINT)]
)
def test_an_interruption_of_the_imports(words: tuple[str, ...], code: int, tmp_path: Path) -> None:
    """One line if it is the command's process; a program that imports the package gets its KeyboardInterrupt."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    root = Path(program.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}, text=True,
        capture_output=True, check=False, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert run.returncode == code
    assert (run.stderr == "\ninterrupted: nothing was written\n") == (code == 130)


def test_the_command_keeps_its_heap_unless_the_user_has_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda name, value: calls.append((name, value)))
    monkeypatch.setattr(_startup.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(_startup.sys, "platform", "linux")
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    _startup.keep_heap()
    assert calls == [(-3, 32 * 2**20), (-1, 2**31 - 1)]
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    _startup.keep_heap()
    assert len(calls) == 2
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr(_startup.ctypes, "CDLL", lambda _: SimpleNamespace())  # another C library
    _startup.keep_heap()
    monkeypatch.setattr(_startup.sys, "platform", "darwin")
    monkeypatch.setattr(_startup.ctypes, "CDLL", lambda _: pytest.fail("called"))
    _startup.keep_heap()
