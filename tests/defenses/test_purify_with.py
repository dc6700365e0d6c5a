"""GIC in front of purifiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bdfast.defenses import (
    D3Config,
    FineTuneConfig,
    FTSAMConfig,
    GICConfig,
    d3,
    fine_tune,
    ft_sam,
    gic,
    purify_with,
)
from bdfast.training.results import TrainedResult
from tests.defenses.conftest import Split


@pytest.mark.parametrize(
    ("purifier", "config"),
    [
        (d3, D3Config(epochs=2, layers=["5"])),
        (fine_tune, FineTuneConfig(epochs=2)),
        (ft_sam, FTSAMConfig(epochs=2)),
    ],
)
def test_it_is_gic_and_then_the_purifier(mlp: nn.Sequential, tiny: Split, purifier: Any, config: Any) -> None:
    ours = purify_with(mlp, tiny, purifier, gic_config=GICConfig(steps=3), purifier_config=config)
    calibrated = gic(mlp, tiny, GICConfig(steps=3))
    by_hand = purifier(mlp, calibrated.data, config)
    for p, q in zip(ours.model.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [record["loss"] for record in ours.history] == [record["loss"] for record in by_hand.history]
    content = json.loads(ours.to_json())
    assert content["gic"]["config"]["steps"] == 3
    assert content["purifier"]["config"]["epochs"] == 2


def test_a_purifier_of_ones_own_with_its_default_config(mlp: nn.Sequential, tiny: Split, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def mine(model: nn.Module, clean_data: Any, **options: Any) -> TrainedResult:
        seen.update(options, images=clean_data[0])
        return TrainedResult(model, [], {"mine": 1.0})

    result = purify_with(mlp, tiny, mine, checkpoint=tmp_path / "resume.pt", normalize=((0.5,), (0.5,)))
    assert seen["images"].dtype == torch.float32
    assert seen["normalize"] == ((0.5,), (0.5,))
    assert seen["checkpoint"] == tmp_path / "resume.pt"
    assert (tmp_path / "resume.gic").is_dir()
    assert set(result.timings) == {"gic.calibrate", "gic.imprint", "mine"}


def test_wrong_purifier(mlp: nn.Sequential, tiny: Split) -> None:
    with pytest.raises(TypeError, match="purify_with: `purifier` expected a function"):
        purify_with(mlp, tiny, "d3")
