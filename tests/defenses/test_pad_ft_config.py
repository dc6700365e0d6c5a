"""PadFTConfig: presets, values given, and the message of every error."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bdfast.defenses import PadFTConfig
from bdfast.defenses.pad_ft.config import PRESETS


def test_the_default_is_the_paper() -> None:
    config = PadFTConfig()
    assert (config.lam, config.lam_factor, config.target_accuracy, config.lam_start, config.lam_every) == (
        0.5, 1.2, 95.0, 10, 10,
    )  # fmt: skip
    assert (config.clip_lr, config.clip_epochs, config.clip_batch_size, config.init) == (0.1, 50, 200, "observed")
    assert (config.lr, config.momentum, config.weight_decay, config.batch_size, config.epochs) == (
        0.01, 0.9, 5e-4, 256, 20,
    )  # fmt: skip
    assert (config.k, config.trim, config.split, config.suspect_weight, config.keep) == (300, 0.0, "none", 0.0, "last")
    assert (config.log_zero, config.clamp, config.beta) == (-4.0, None, 1.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_what_is_not_given(preset: Any) -> None:
    config = PadFTConfig(preset=preset, lam=3.0)
    expected = {**PRESETS[preset], "lam": 3.0}
    assert {name: getattr(config, name) for name in expected} == expected
    assert dataclasses.replace(config, k=5).lam == 3.0


def test_weights_of_sce_by_data_set() -> None:
    ten, hundred = PadFTConfig.for_cifar10(), PadFTConfig.for_cifar100(b=0.2)
    assert (ten.a, ten.b, ten.k) == (0.1, 1.0, 300)
    assert (hundred.a, hundred.b, hundred.k) == (6.0, 0.2, 30)


def test_cached_features_cycle_ten_draws() -> None:
    assert PadFTConfig(cache_features=True).draws == 10
    assert PadFTConfig(cache_features=True, draws=3).draws == 3
    assert PadFTConfig().draws is None


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("preset", "best", "`preset` expected one of paper, robust, got 'best'"),
        ("k", 0, "`k` expected a whole number, at least 1, got 0"),
        ("k", 1.5, "`k` expected a whole number"),
        ("trim", 1.0, "`trim` expected a finite number >= 0 and < 1, got 1.0"),
        ("split", "modes", "`split` expected one of none, spread"),
        ("spread_ratio", 0.5, "`spread_ratio` expected a finite number >= 1"),
        ("sites", "stem", '`sites` expected "stage-relu", "all-relu", or a list of module names, got \'stem\''),
        ("sites", [], "`sites` expected"),
        ("init", 0.0, "`init` expected a finite number > 0"),
        ("init", "huge", "`init` expected a number > 0, got 'huge'"),
        ("lam", -1.0, "`lam` expected"),
        ("lam_factor", 1.0, "`lam_factor` expected a finite number > 1"),
        ("lam_start", 1.0, "`lam_start` expected a whole number of epochs"),
        ("lam_every", 0, "`lam_every` expected"),
        ("target_accuracy", 101.0, "`target_accuracy` expected"),
        ("keep", "first", "`keep` expected one of last, best"),
        ("suspect_weight", -1.0, "`suspect_weight` expected"),
        ("clip_lr", 0.0, "`clip_lr` expected"),
        ("clip_epochs", -1, "`clip_epochs` expected"),
        ("a", float("nan"), "`a` expected"),
        ("log_zero", 0.0, "`log_zero` expected a number < 0, got 0.0"),
        ("clamp", 1.0, "`clamp` expected"),
        ("epochs", 0, "`epochs` expected"),
        ("momentum", 1.0, "`momentum` expected"),
        ("brightness", 1.0, "`brightness` expected"),
        ("flip", "yes", "`flip` expected True or False, got 'yes'"),
        ("cache_features", 1, "`cache_features` expected True or False"),
        ("draws", 0, "`draws` expected"),
        ("seed", -1, "`seed` expected a whole number in [0, 2^32)"),
        ("deterministic", 1, "`deterministic` expected True or False"),
    ],
)
def test_wrong_values(name: str, value: Any, part: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        PadFTConfig(**{name: value})
    assert str(error.value).startswith("PadFTConfig: ")
    assert part in str(error.value)
