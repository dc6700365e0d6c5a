"""Results of defenses and tables of metrics, as BackdoorBench's scripts leave them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bdfast import models
from bdfast.data import read_index, reserve
from bdfast.integrations.backdoorbench import read_artefact, read_metrics, write_defense_result, write_metrics
from bdfast.integrations.backdoorbench.metrics_file import mean_of_batches
from bdfast.nn import clip_activations


def test_defense_result(tmp_path: Path) -> None:
    model = models.build("digits_cnn", num_classes=10, image_size=8, seed=0)
    rows = [{"epoch": 1, "test_acc": 0.5, "test_asr": math.nan}, {"epoch": 2, "test_acc": 0.25, "ra_test": 1.0}]
    out = write_defense_result(
        tmp_path, "ft", model, model_name="preact_resnet18", num_classes=10, history=rows, index=torch.tensor([4, 2])
    )
    assert out == tmp_path / "defense" / "ft"
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint", "defense_result.pt", "ft_df.csv", "ft_df_summary.csv", "log",
    ]  # fmt: skip
    content = torch.load(out / "defense_result.pt", weights_only=True)
    assert list(content) == ["model_name", "num_classes", "model"]
    assert content["model_name"] == "preactresnet18"
    assert all(torch.equal(content["model"][key], value) for key, value in model.state_dict().items())
    assert (out / "log" / "index.txt").read_text() == "4\n2\n"
    assert (out / "ft_df.csv").read_text() == (",epoch,test_acc,test_asr,ra_test\n0,1,0.5,nan_value,\n1,2,0.25,,1.0\n")
    assert (out / "ft_df_summary.csv").read_text() == (
        ",epoch,test_acc,test_asr,ra_test\nlast,2,0.25,nan_value,1.0\nvalid_max,2.0,0.5,,1.0\n"
        "exist_nan_value,False,False,True,False\n"
    )


def test_clipped_models_are_plain_weights_and_bounds(tmp_path: Path) -> None:
    model = models.build("digits_cnn", num_classes=10, image_size=8, seed=0).eval()
    plain = list(model.state_dict())
    clipped = clip_activations(model, example=torch.zeros(1, 1, 8, 8))
    with pytest.warns(UserWarning, match="activation bounds are kept under `bdfast`"):
        out = write_defense_result(
            tmp_path, "pad-ft", clipped, model_name="digits_cnn", num_classes=10, extra={"note": "x"}
        )
    content = read_artefact(out / "defense_result.pt").value
    assert list(content["model"]) == plain
    bounds = {key: value for key, value in clipped.state_dict().items() if key.startswith("clips.")}
    assert bounds
    assert content["bdfast"]["note"] == "x"
    for key, value in bounds.items():
        site = key.removeprefix("clips.").removesuffix(".bound")
        assert torch.equal(content["bdfast"]["bounds"][site], value)


@pytest.mark.parametrize("method", ["", "../x", "FT", "a/b", "a b"])
def test_method_is_a_folder(method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`method` expected a lower-case name"):
        write_defense_result(tmp_path, method, {}, model_name="x", num_classes=2)
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "a_df.csv").write_text(",test_asr,extra,test_acc\n0,nan_value,x,0.5\n1,,,1\n\n2,0.25\n")
    rows = read_metrics(tmp_path / "a_df.csv")
    assert math.isnan(rows[0]["test_asr"])
    assert rows[0]["test_acc"] == 0.5
    assert rows[1:] == [{"test_acc": 1.0}, {"test_asr": 0.25}]
    write_metrics(tmp_path, "b", [])
    with pytest.raises(ValueError, match="a header of columns"):
        read_metrics(tmp_path / "b_df.csv")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_metrics(tmp_path / "c_df.csv")


def test_mean_of_batches() -> None:
    assert mean_of_batches([1.0, 2.0, 3.0, 4.0, 10.0], [2, 2, 1]) == pytest.approx((1.5 + 3.5 + 10) / 3)
    for sizes in ([2, 2], [], [5, 0]):
        with pytest.raises(ValueError, match="`sizes` expected sizes that add up to 5"):
            mean_of_batches([0.0] * 5, sizes)


def test_the_benchmark_s_draw_and_index_file(tmp_path: Path) -> None:
    """random.seed(0); random.sample(range(50), int(50 * 0.1)), and numpy.loadtxt's view of a file."""
    drawn = reserve(torch.zeros(50, dtype=torch.int64), ratio=0.1, seed=0, draw="backdoorbench")
    assert drawn.tolist() == [24, 48, 26, 2, 16]
    (tmp_path / "index.txt").write_text("24\n48\n\n")
    assert read_index(tmp_path / "index.txt").tolist() == [24, 48]
