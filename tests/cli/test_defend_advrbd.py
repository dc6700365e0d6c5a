"""``bdfast defend advrbd``: the poisoned set and an architecture; what it splits is written and shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from .conftest import Outcome

QUICK = [
    f"--set={item}"
    for item in ("warm_up_epochs=1", "enhance_epochs=1", "rounds=2", "epochs=2", "steps=1", "content_epochs=1",
                 "content_networks=2", "content_check=true", "min_per_class=3")
]  # fmt: skip


def test_a_new_network_is_trained_on_the_clean_part(
    bdfast: Callable[..., Outcome], attack_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "advrbd"
    done = bdfast("defend", "advrbd", "--attack-dir", attack_dir, "--out", out, *QUICK)
    assert done.code == 0, done.err
    result = json.loads((out / "result.json").read_text())
    assert result["config"]["lr"] == 0.1  # for digits
    assert sorted(result["clean_indices"] + result["poisoned_indices"]) == list(range(200))
    assert [record["round"] for record in result["rounds"]] == [1, 2]
    assert 0 <= result["quality"]["tpr"] <= 1
    assert not list(out.glob("*.stages"))
    assert (out / "report.html").stat().st_size > 10_000
    again = bdfast("evaluate", "--model", out / "model.safetensors", "--attack-dir", attack_dir, "--json")
    assert json.loads(again.out)["model"] == json.loads((out / "metrics.json").read_text())["after"]
