"""``bdfast defend pad-ft``: the poisoned set instead of a reserve, and a clipped network that is read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bdfast.runtime.checkpoints import load_state

from .conftest import Outcome

QUICK = [f"--set={item}" for item in ("preset=robust", "clip_epochs=2", "epochs=2")]


def test_a_clipped_network_is_evaluated_like_any_other(
    bdfast: Callable[..., Outcome], attack_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pad_ft"
    assert bdfast("defend", "pad-ft", "--attack-dir", attack_dir, "--out", out, *QUICK).code == 0
    state = load_state(out / "model.safetensors").state
    assert [name for name in state if name.startswith("clips.")] == [f"clips.relu{i}.bound" for i in (1, 2, 3)]
    result = json.loads((out / "result.json").read_text())
    assert result["config"]["k"] == 100
    assert result["purity"]["total"] > 0
    assert not list(out.glob("*.scores"))

    again = bdfast("evaluate", "--model", out / "model.safetensors", "--attack-dir", attack_dir, "--json")
    after = json.loads((out / "metrics.json").read_text())["after"]
    assert again.code == 0
    assert json.loads(again.out)["model"] == after


@pytest.mark.parametrize("option", ["--reserve=0.1", "--draw=backdoorbench", "--auxiliary=blur"])
@pytest.mark.parametrize("defense", ["pad-ft", "advrbd"])
def test_there_are_no_clean_images_to_choose(
    bdfast: Callable[..., Outcome], attack_dir: Path, tmp_path: Path, defense: str, option: str
) -> None:
    """These two take the poisoned set: an option that had no effect would pass for one that had."""
    refused = bdfast("defend", defense, "--attack-dir", attack_dir, "--out", tmp_path / "out", option)
    assert refused.code == 2
    assert f"unrecognized arguments: {option}" in refused.err
    by_name = bdfast(
        "defend", defense, "--attack-dir", attack_dir, "--out", tmp_path / "out", "--set", option.removeprefix("--")
    )
    assert by_name.code == 2
    assert "expected the name of a setting" in by_name.err
    shown = bdfast("defend", defense, "--help").out
    assert option.partition("=")[0] not in shown
