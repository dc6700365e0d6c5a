"""A callback, a checkpoint or a device of another kind is refused before any work, by everything that takes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bdfast.attacks import kl_scores
from bdfast.defenses import GICConfig, d3, fine_tune, ft_sam, gic, pad_ft, purify_with, sce_scores
from bdfast.defenses.gic.calibrators import calibrator
from bdfast.training import train_classifier

TAKE_ONE: tuple[Callable[..., Any], ...] = (d3, fine_tune, ft_sam, gic, pad_ft, sce_scores, kl_scores, train_classifier)


@pytest.mark.parametrize("function", TAKE_ONE, ids=lambda function: function.__name__)
def test_a_callback_that_cannot_be_called(function: Callable[..., Any]) -> None:
    """The data is never looked at."""
    name = function.__name__
    with pytest.raises(TypeError, match=rf"^{name}: `callback` expected a function of a record, got int; pass print"):
        function(nn.Flatten(), object(), callback=3)


@pytest.mark.parametrize("function", TAKE_ONE, ids=lambda function: function.__name__)
def test_a_checkpoint_that_is_no_path(function: Callable[..., Any]) -> None:
    name, argument = function.__name__, "scores_dir" if function is pad_ft else "checkpoint"
    with pytest.raises(TypeError, match=rf"^{name}: `{argument}` expected a path, got int; pass text or a pathlib"):
        function(nn.Flatten(), object(), **{argument: 3})


@pytest.mark.parametrize("function", [one for one in TAKE_ONE if one is not train_classifier])
def test_a_device_that_is_none(function: Callable[..., Any]) -> None:
    data = torch.rand(4, 1, 2, 2), torch.arange(4) % 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(
        TypeError, match=rf"^{function.__name__}: `device` expected a torch.device, or its name, got flo"
    ):
        function(model, data, device=3.5)


def test_purify_with_and_calibrators() -> None:
    expected = "`callback` expected a function of a record, got str"
    with pytest.raises(TypeError, match="^purify_with: " + expected):
        purify_with(nn.Flatten(), object(), d3, callback="print")  # type: ignore[arg-type]
    one = calibrator(GICConfig())
    with pytest.raises(TypeError, match="^fit: " + expected):
        one.fit(nn.Flatten(), object(), callback="print")  # type: ignore[arg-type]
