"""``bdfast score``, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bdfast.attacks import PoisonedData, kl_scores
from bdfast.cli.commands import score
from bdfast.runtime import ScoreTable
from tests.cli.conftest import Outcome, names

Run = Callable[..., Outcome]
QUICK = ["--set", "steps=2", "--set", "batch_size=64"]
RESULTS = ["config.json", "report.html", "scores.csv", "summary.json"]


@pytest.fixture(scope="module")
def scores_dir(attack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bdfast.cli import main

    out = tmp_path_factory.mktemp("scores") / "advrbd"
    words = ["score", "advrbd", "--attack-dir", str(attack_dir), *QUICK, "--verify", "40", "--out", str(out)]
    assert main(words) == 0
    return out


def test_results(scores_dir: Path, attack_dir: Path) -> None:
    assert names(scores_dir) == RESULTS
    table = ScoreTable.load(scores_dir / "scores.csv")
    poisoned = PoisonedData.load(attack_dir / "poisoned.npz")
    assert torch.equal(table.ids, torch.arange(200))
    assert torch.equal(table.columns["label"], poisoned.labels)
    summary = json.loads((scores_dir / "summary.json").read_text())
    assert (summary["samples"], summary["quarantined"], summary["halved"]) == (200, 0, 0)
    assert summary["poisoned"] == int(poisoned.is_poisoned.sum())
    assert summary["auroc"] == pytest.approx(1 - table.auroc(poisoned.is_poisoned))
    assert summary["auroc of confidence"] == pytest.approx(
        ScoreTable(table.ids, table.columns["confidence"]).auroc(poisoned.is_poisoned)
    )
    assert (summary["verify"]["samples"], summary["verify"]["overlap"]) == (40, 1.0)
    assert summary["verify"]["max_difference"] < 1e-3 * float(table.scores.max())
    settings = json.loads((scores_dir / "config.json").read_text())
    assert (settings["command"], settings["steps"], settings["eps"]) == ("score advrbd", 2, 8 / 255)
    assert "data:image/png;base64," in (scores_dir / "report.html").read_text()


def test_saved_config_repeats_the_scores(bdfast: Run, scores_dir: Path, tmp_path: Path) -> None:
    outcome = bdfast("score", "advrbd", "--config", scores_dir / "config.json", "--out", tmp_path, "--report", "none")
    assert outcome.code == 0
    assert "auroc" in outcome.out
    assert names(tmp_path) == ["config.json", "scores.csv", "summary.json"]
    assert (tmp_path / "scores.csv").read_bytes() == (scores_dir / "scores.csv").read_bytes()


def test_two_processes_make_the_same_scores(scores_dir: Path, attack_dir: Path, tmp_path: Path) -> None:
    """The grid of chunks does not know how many processes there are."""
    words = ["score", "advrbd", "--attack-dir", str(attack_dir), *QUICK, "--report", "none", "--out", str(tmp_path)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "launch.py"
    # Chunks of one batch, so that there is more than one to share.
    script.write_text(
        "import sys, bdfast.cli\n"
        "from bdfast.attacks import kl_scores\n"
        "sys.modules[kl_scores.__module__].CHUNK = {'cpu': 64}\n"
        "sys.exit(bdfast.cli.main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*launcher, str(script), *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in") == 1
    assert (tmp_path / "scores.csv").read_bytes() == (scores_dir / "scores.csv").read_bytes()


def test_an_interrupted_run_goes_on(
    bdfast: Run, attack_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[kl_scores.__module__], "CHUNK", {"cpu": 64})
    words = ["score", "advrbd", "--attack-dir", attack_dir, *QUICK, "--report", "none", "--out", tmp_path]
    monkeypatch.setattr(score, "summarise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert bdfast(*words).code == 130
    assert names(tmp_path) == [score.KEPT]
    assert len(list((tmp_path / score.KEPT).glob("scores-*.npz"))) == 4
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules[kl_scores.__module__], "CHUNK", {"cpu": 64})
    outcome = bdfast(*words)
    assert outcome.code == 0
    assert "advrbd 1/" not in outcome.err  # nothing was left to score
    assert names(tmp_path) == ["config.json", "scores.csv", "summary.json"]


def test_errors_and_help(bdfast: Run, attack_dir: Path, tmp_path: Path) -> None:
    outcome = bdfast("score", "advrbd", "--attack-dir", attack_dir, "--set", "epz=1", "--out", tmp_path / "x")
    assert outcome.code == 2
    assert "did you mean eps" in outcome.err
    assert not (tmp_path / "x").exists()
    assert "--model` expected a checkpoint" in bdfast("score", "advrbd", "--out", tmp_path / "x").err
    assert "step_size" in bdfast("score", "advrbd", "--help").out


def test_roc_of_ties_and_of_one_kind() -> None:
    flags = torch.tensor([True, False, True, False])
    assert score.roc(torch.tensor([1.0, 1.0, 0.0, float("nan")]), flags) == ([0.0, 1.0, 1.0], [0.0, 0.5, 1.0])
    assert score.roc(torch.tensor([2.0, 1.0]), torch.tensor([True, True])) == ([0.0, 0.0, 0.0], [0.0, 0.5, 1.0])


def test_sce_says_whom_pad_ft_would_trust(bdfast: Run, attack_dir: Path, tmp_path: Path) -> None:
    words = ["score", "sce", "--attack-dir", attack_dir, "--set", "k=5", "--out", tmp_path / "sce"]
    outcome = bdfast(*words)
    assert outcome.code == 0, outcome.err
    assert names(tmp_path / "sce") == RESULTS
    table = ScoreTable.load(tmp_path / "sce" / "scores.csv")
    poisoned = PoisonedData.load(attack_dir / "poisoned.npz")
    selected, labels = table.columns["selected"], table.columns["label"]
    assert torch.equal(labels, poisoned.labels)
    for c in labels.unique():
        here = (labels == c).nonzero().flatten()
        lowest = here[table.scores[here].argsort(stable=True)[:5]]
        assert torch.equal(
            selected[here].nonzero().flatten(), lowest.sort().values.unsqueeze(1).eq(here).nonzero()[:, 1]
        )
    summary = json.loads((tmp_path / "sce" / "summary.json").read_text())
    assert summary["selected"] == int(selected.sum())
    zero = selected & (labels == 0)
    assert summary["purity"]["0"] == pytest.approx(float((~poisoned.is_poisoned[zero]).double().mean()))
    saved = json.loads((tmp_path / "sce" / "config.json").read_text())
    assert (saved["k"], saved["split"], "clip_lr" in saved, "verify" in saved) == (5, "none", False, False)
    again = bdfast("score", "sce", "--config", tmp_path / "sce" / "config.json", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "scores.csv").read_bytes() == (tmp_path / "sce" / "scores.csv").read_bytes()


def test_settings_of_sce_are_those_that_act_on_it(bdfast: Run, attack_dir: Path, tmp_path: Path) -> None:
    """What had no effect would pass for what had one."""
    shown = bdfast("score", "sce", "--help").out
    assert "\n  spread_ratio " in shown
    assert not any(f"\n  {name} " in shown for name in ("lam", "clip_epochs", "lr", "precision", "flip"))
    assert "--verify" not in shown
    assert "--verify" in bdfast("score", "advrbd", "--help").out
    words = ["score", "sce", "--attack-dir", attack_dir, "--out", tmp_path / "x"]
    assert "unrecognized arguments: --verify 3" in bdfast(*words, "--verify", "3").err
    for item in ("clip_lr=0.5", "verify=3"):
        refused = bdfast(*words, "--set", item)
        assert refused.code == 2
        assert f"`--set {item.partition('=')[0]}` expected the name of a setting" in refused.err
