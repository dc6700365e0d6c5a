"""Every defense works for a caller in inference mode, on data and a model made there, and in other modes of torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdfast import models
from bdfast.attacks import KLScoreConfig, kl_scores, poison
from bdfast.defenses import (
    D3Config,
    FineTuneConfig,
    FTSAMConfig,
    GICConfig,
    PadFTConfig,
    d3,
    fine_tune,
    ft_sam,
    gic,
    pad_ft,
    sce_scores,
)
from bdfast.training import TrainConfig, train_classifier

Split = tuple[Tensor, Tensor]

CALLS: dict[str, Callable[[nn.Module, Split], Any]] = {
    "d3": lambda model, data: d3(model, data, D3Config(epochs=1)).model,
    "d3 in bfloat16": lambda model, data: d3(model, data, D3Config(epochs=4, precision="bf16")).model,
    "fine_tune": lambda model, data: fine_tune(model, data, FineTuneConfig(epochs=1)).model,
    "ft_sam": lambda model, data: ft_sam(model, data, FTSAMConfig(epochs=1)).model,
    "pad_ft": lambda model, data: pad_ft(model, data, PadFTConfig(k=9, clip_epochs=1, epochs=1)).model,
    "gic": lambda model, data: gic(model, data, GICConfig(steps=1)).data[0],
    "gic network": lambda model, data: gic(model, data, GICConfig(mode="network", epochs=1)).data[0],
    "kl_scores": lambda model, data: kl_scores(model, data, KLScoreConfig(steps=1)).scores,
    "sce_scores": lambda model, data: sce_scores(model, data, PadFTConfig(preset="robust")).scores,
}

MORE_CALLS: dict[str, Callable[[nn.Module, Split], Any]] = {
    "train_classifier": lambda model, data: train_classifier(copy.deepcopy(model), data, TrainConfig(epochs=1)).model,
    "d3, noise": lambda model, data: d3(model, data, D3Config(epochs=1, warm_up="noise")).model,
    "d3, near": lambda model, data: d3(model, data, D3Config(epochs=1, warm_up="near", near_noise=0.01)).model,
    "pad_ft, robust": lambda model, data: pad_ft(model, data, replace(ROBUST, k=5, clip_epochs=2, epochs=2)).model,
    "input_aware": lambda model, data: poison(*data, "input_aware", rate=0.2, num_classes=3).images,
}
ROBUST = PadFTConfig(preset="robust", spread_ratio=1, margin_gap=0, clear_gap=0, split_dims=16)


def outcome(value: Any) -> list[Tensor]:
    return list(value.state_dict().values()) if isinstance(value, nn.Module) else [value]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:pad_ft. clipping lost", "ignore:gic. `imprint`")
def test_the_result_is_that_of_the_ordinary_mode(name: str, mlp: nn.Sequential, tiny: Split) -> None:
    expected = outcome(CALLS[name](mlp, tiny))
    with torch.inference_mode():
        model = copy.deepcopy(mlp)
        data = tiny[0].clone(), tiny[1].clone()
        inside = outcome(CALLS[name](model, data))
    outside = outcome(CALLS[name](model, data))
    for a, b, c in zip(expected, inside, outside, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert not b.is_inference()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:pad_ft. clipping lost", "ignore:gic. `imprint`")
def test_the_callers_autocast_stays_outside(name: str, mlp: nn.Sequential, tiny: Split) -> None:
    """What precision a defense works in is its config's to say."""
    expected = outcome(CALLS[name](mlp, tiny))
    with torch.autocast("cpu", torch.bfloat16):
        inside = outcome(CALLS[name](mlp, tiny))
        assert torch.is_autocast_enabled("cpu")
    assert all(map(torch.equal, expected, inside))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:pad_ft. clipping lost", "ignore:gic. `imprint`")
def test_defenses_work_under_another_default_dtype(name: str, tiny: Split) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 80), nn.ReLU(), nn.Linear(80, 3))  # more features than are kept
    torch.set_default_dtype(torch.float64)
    try:
        assert outcome(CALLS[name](model, tiny))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("name", [*CALLS, *MORE_CALLS])
@pytest.mark.filterwarnings("ignore:pad_ft. clipping lost", "ignore:gic. `imprint`", "ignore:pad_ft. the model miscl")
def test_the_default_dtype_changes_no_bit(name: str, default: torch.dtype) -> None:
    """What is drawn for a seed has a dtype of its own, and so has what kernels write."""
    model = models.build("digits_cnn", num_classes=3, image_size=8, seed=0)
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (30, 1, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(30) % 3
    call = {**CALLS, **MORE_CALLS}[name]
    expected = outcome(call(model, data))
    torch.set_default_dtype(default)
    try:
        found = outcome(call(model, data))
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_a_model_of_inference_tensors_cannot_be_trained_in_place(tiny: Split) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match=r"train_classifier: `model` expected parameters that autograd can follow"):
        train_classifier(model, tiny)
