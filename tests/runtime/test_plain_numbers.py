"""Configs of numpy's numbers are those of Python's."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from bdfast.attacks import KLScoreConfig
from bdfast.defenses import AdvrBDConfig, D3Config, FineTuneConfig, FTSAMConfig, GICConfig, PadFTConfig
from bdfast.runtime import Augment
from bdfast.runtime.plain_json import plain
from bdfast.training import TrainConfig

NUMBERS: dict[type, dict[str, Any]] = {
    D3Config: {"epochs": 2, "lam": 0.5, "seed": 3},
    FineTuneConfig: {"epochs": 2, "lr": 0.5, "seed": 3},
    FTSAMConfig: {"batch_size": 8, "rho": 0.5, "seed": 3},
    PadFTConfig: {"k": 5, "trim": 0.5, "seed": 3},
    AdvrBDConfig: {"rounds": 2, "mu": 0.5, "seed": 3},
    GICConfig: {"steps": 4, "delta": 0.5, "seed": 3},
    TrainConfig: {"epochs": 2, "lr": 0.5, "seed": 3},
    KLScoreConfig: {"steps": 2, "eps": 0.5, "seed": 3},
    Augment: {"crop_padding": 2, "flip": True},
}


def of_numpy(value: Any) -> np.generic:
    if isinstance(value, bool):
        return np.bool_(value)
    return np.int64(value) if isinstance(value, int) else np.float32(value)


@pytest.mark.parametrize("kind", NUMBERS, ids=lambda kind: kind.__name__)
def test_configs_take_them(kind: Any) -> None:
    config = kind(**{name: of_numpy(value) for name, value in NUMBERS[kind].items()})
    assert config == kind(**NUMBERS[kind])
    assert [type(getattr(config, name)) for name in NUMBERS[kind]] == [type(v) for v in NUMBERS[kind].values()]
    assert json.loads(json.dumps(plain(asdict(config)))).items() >= NUMBERS[kind].items()


def test_what_is_no_number_is_still_refused() -> None:
    with pytest.raises((TypeError, ValueError), match="`lr` expected a number"):
        TrainConfig(lr=np.str_("0.1"))  # type: ignore[arg-type]
