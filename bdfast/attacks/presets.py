"""The settings of papers and benchmarks, as arguments of :func:`bdfast.attacks.poison`."""

from __future__ import annotations

from typing import Any

from bdfast.attacks.registry import find
from bdfast.errors import message

_ADVRBD: dict[str, Any] = {"rate": 0.05, "target": 1}  # Table I
_BACKDOORBENCH: dict[str, Any] = {"rate": 0.1, "target": 0}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "advrbd": {
        "badnets": {**_ADVRBD, "pattern": "white"},
        "blended": {**_ADVRBD, "alpha": 0.2},
        "sig": _ADVRBD,
        "wanet": {**_ADVRBD, "cover_rate": 0.05},
        "physical_ba": {**_ADVRBD, "pattern": "logo-proc"},
        "tact": {**_ADVRBD, "cover_rate": 0.01, "source": 0, "pattern": "white"},
        "adaptive_blend": {**_ADVRBD, "cover_rate": 0.01, "alpha": 0.2, "test_alpha": 0.2},
        "adaptive_patch": {**_ADVRBD, "cover_rate": 0.01, "pattern": "logos-proc"},
    },
    "backdoorbench": dict.fromkeys(("badnets", "blended", "input_aware", "lf", "sig", "ssba", "wanet"), _BACKDOORBENCH),
}


def preset(name: str, attack: str) -> dict[str, Any]:
    """Arguments of :func:`bdfast.attacks.poison` for an attack as a paper sets it; triggers are the procedural ones.

    Args:
        name: "advrbd" (its Table I: 5 %, target 1) or "backdoorbench" (10 %, target 0).
        attack: a name among :func:`bdfast.attacks.names`.

    Raises:
        ValueError: an unknown name, or an attack that the paper does not have.

    Example:
        >>> preset("advrbd", "tact")
        {'rate': 0.05, 'target': 1, 'cover_rate': 0.01, 'source': 0, 'pattern': 'white'}
    """
    if name not in PRESETS:
        expected = f"one of {', '.join(PRESETS)}"
        raise ValueError(message("attacks.preset", "name", expected, repr(name), "choose one of them"))
    attack = find(attack).name
    if attack not in PRESETS[name]:
        expected = f"an attack of {name}: {', '.join(PRESETS[name])}"
        raise ValueError(message("attacks.preset", "attack", expected, repr(attack), "set its options yourself"))
    return dict(PRESETS[name][attack])
