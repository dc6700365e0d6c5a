"""A callback that cannot be called is refused before any work, by everything that takes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
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


def test_purify_with_and_calibrators() -> None:
    expected = "`callback` expected a function of a record, got str"
    with pytest.raises(TypeError, match="^purify_with: " + expected):
        purify_with(nn.Flatten(), object(), d3, callback="print")  # type: ignore[arg-type]
    one = calibrator(GICConfig())
    with pytest.raises(TypeError, match="^fit: " + expected):
        one.fit(nn.Flatten(), object(), callback="print")  # type: ignore[arg-type]
