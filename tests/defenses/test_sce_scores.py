"""The margins of PAD-FT's first step as a table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bdfast.defenses import PadFTConfig, pad_ft, sce_scores
from bdfast.errors import LabelRangeError
from tests.defenses.conftest import Split


def test_the_table_is_what_pad_ft_goes_by(mlp: nn.Module, tiny: Split, tmp_path: Path) -> None:
    config = PadFTConfig(k=4, clip_epochs=1, epochs=1, sites="all-relu")
    result = pad_ft(mlp, tiny, config)
    table = sce_scores(mlp, tiny, config, checkpoint=tmp_path / "kept")
    assert torch.equal(table.scores, result.scores)
    assert torch.equal(table.columns["selected"].nonzero().flatten(), result.selected.sort().values)
    assert not table.columns["suspect"].any()
    again = sce_scores(mlp, tiny, config, checkpoint=tmp_path / "kept")
    assert torch.equal(again.scores, table.scores)


def test_logits_that_are_not_finite_are_in_quarantine(mlp: nn.Module, tiny: Split) -> None:
    images = tiny[0].clone()
    images[3] = 1.0
    with torch.no_grad():
        mlp[1].weight.fill_(3e37)  # twelve pixels of 1 come to infinity, the others stay below it
    table = sce_scores(mlp, (images, tiny[1]), PadFTConfig(k=4))
    assert 3 in table.quarantined
    assert not table.columns["selected"][table.quarantined].any()


def test_errors_name_the_function_and_its_arguments(mlp: nn.Module, tiny: Split, tmp_path: Path) -> None:
    images, labels = tiny
    with pytest.raises(TypeError, match=r"^sce_scores: `data: labels` expected integers"):
        sce_scores(mlp, (images, labels.float()))
    with pytest.raises(LabelRangeError, match=r"^sce_scores: `data: labels` expected classes in"):
        sce_scores(mlp, (images, labels + 1))
    with pytest.raises(ValueError, match=r"^sce_scores: `model` expected logits that come straight"):
        sce_scores(nn.Sequential(*mlp.children(), nn.Softmax(1)), tiny)
    sce_scores(mlp, tiny, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"^sce_scores: `checkpoint` expected scores of this very run"):
        sce_scores(mlp, (images[1:], labels[1:]), checkpoint=tmp_path)


def test_config_of_another_kind(mlp: nn.Module, tiny: Split) -> None:
    with pytest.raises(TypeError, match="sce_scores: `config` expected a PadFTConfig, got int"):
        sce_scores(mlp, tiny, 3)  # type: ignore[arg-type]
