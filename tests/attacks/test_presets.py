"""Settings of papers are arguments of poison, and every one of them runs."""

from __future__ import annotations

import pytest

from bdfast.attacks import poison, preset
from bdfast.attacks.presets import PRESETS

from .conftest import make_set


@pytest.mark.parametrize("attack", list(PRESETS["advrbd"]))
def test_advrbd(attack: str) -> None:
    images, labels = make_set(200)
    data = poison(images, labels, attack, **preset("advrbd", attack))
    covers = {"wanet": 10, "tact": 2, "adaptive_blend": 2, "adaptive_patch": 2}
    assert len(data.poison_indices) == 10
    assert len(data.cover_indices) == covers.get(attack, 0)
    assert (data.labels[data.is_poisoned] == 1).all()


def test_names() -> None:
    assert preset("backdoorbench", "WaNet") == {"rate": 0.1, "target": 0}
    preset("advrbd", "tact")["rate"] = 0.5
    assert preset("advrbd", "tact")["rate"] == 0.05
    with pytest.raises(ValueError, match=r"attacks.preset: `name` expected one of advrbd, backdoorbench, got 'x'"):
        preset("x", "tact")
    with pytest.raises(ValueError, match=r"attacks.preset: `attack` expected an attack of advrbd: badnets, .*got 'lf'"):
        preset("advrbd", "lf")
    with pytest.raises(ValueError, match="attacks: `attack` expected one of"):
        preset("advrbd", "nothing")
