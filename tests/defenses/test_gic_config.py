"""Options of GIC: what is refused, and what None stands for."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest

from bdfast.defenses import GICConfig


def test_derived_values() -> None:
    assert GICConfig().step == pytest.approx(1 / 255)
    assert GICConfig(delta=0.4, step_size=0.3).step == 0.3
    assert GICConfig(mode="prompt", delta=0.4).learning_rate == pytest.approx(0.04)
    assert GICConfig(mode="network", delta=0.4).learning_rate == 1e-3
    assert GICConfig(mode="network", lr=0.5).learning_rate == 0.5


def test_norms_have_one_spelling_each() -> None:
    assert [GICConfig(p=p).p for p in ("inf", math.inf, 2, 2.0)] == ["inf", "inf", 2.0, 2.0]  # type: ignore[arg-type]
    assert json.loads(json.dumps(asdict(GICConfig(p=math.inf)), allow_nan=False))["p"] == "inf"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"mode": "pixel"}, ValueError, "`mode` expected one of sample, prompt, network, got 'pixel'"),
        ({"p": 1}, ValueError, '`p` expected "inf" or 2, got 1'),
        ({"p": True}, ValueError, "`p` expected"),
        ({"p": 2, "mode": "network"}, ValueError, '`p` expected "inf" with mode="network", got 2.0'),
        ({"delta": 0}, ValueError, "`delta` expected a finite number > 0, got 0"),
        ({"delta": math.nan}, ValueError, "`delta` expected a finite number > 0, got nan"),
        ({"delta": "8/255"}, TypeError, "`delta` expected a number > 0"),
        ({"steps": 0}, ValueError, "`steps` expected a whole number, at least 1, got 0"),
        ({"step_size": 0.0}, ValueError, "`step_size` expected a finite number > 0"),
        ({"lr": -1}, ValueError, "`lr` expected a finite number > 0"),
        ({"epochs": 1.5}, ValueError, "`epochs` expected a whole number"),
        ({"batch_size": True}, ValueError, "`batch_size` expected a whole number"),
        ({"momentum": 1}, ValueError, "`momentum` expected a finite number >= 0 and < 1, got 1"),
        ({"per_class": 1}, TypeError, "`per_class` expected True or False, got 1"),
        ({"deterministic": 1}, TypeError, "`deterministic` expected True or False, got 1"),
        ({"w_bn": -0.1}, ValueError, "`w_bn` expected a finite number >= 0"),
        ({"labels": "none"}, ValueError, "`labels` expected one of given, pseudo"),
        ({"conf": 0.0}, ValueError, "`conf` expected a finite number > 0"),
        ({"conf": 1.1}, ValueError, "`conf` expected a finite number > 0 and < 1"),
        ({"mix": 1.5}, ValueError, "`mix` expected a finite number >= 0 and < 1"),
        ({"drift": 1}, ValueError, "`drift` expected a finite number >= 0 and < 1"),
        ({"seed": -1}, ValueError, "`seed` expected a whole number in"),
        ({"precision": "fp16"}, ValueError, "`precision` expected one of fp32, bf16"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="GICConfig: " + text):
        GICConfig(**options)


def test_bounds_are_closed_where_they_say_so() -> None:
    config = GICConfig(conf=1.0, mix=1.0, w_bn=0, drift=0, momentum=0)
    assert (config.conf, config.mix) == (1.0, 1.0)
