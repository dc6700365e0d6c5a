"""Attacks by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from bdfast.attacks.adaptive_blend import AdaptiveBlend
from bdfast.attacks.adaptive_patch import AdaptivePatch
from bdfast.attacks.badnets import BadNets
from bdfast.attacks.base import Attack
from bdfast.attacks.blended import Blended
from bdfast.attacks.input_aware import InputAware
from bdfast.attacks.lf import LF
from bdfast.attacks.physical_ba import PhysicalBA
from bdfast.attacks.sig import SIG
from bdfast.attacks.ssba import SSBA
from bdfast.attacks.tact import TaCT
from bdfast.attacks.wanet import WaNet
from bdfast.errors import message
from bdfast.runtime.plain_numbers import plain_number

_KINDS: tuple[type[Attack], ...] = (
    AdaptiveBlend, AdaptivePatch, BadNets, Blended, InputAware, LF, PhysicalBA, SIG, SSBA, TaCT, WaNet,
)  # fmt: skip
_ATTACKS = {kind.name: kind for kind in _KINDS}


def names() -> tuple[str, ...]:
    """The names that :func:`get` and :func:`bdfast.attacks.poison` know, sorted.

    Example:
        >>> names()[:4]
        ('adaptive_blend', 'adaptive_patch', 'badnets', 'blended')
    """
    return tuple(sorted(_ATTACKS))


def find(name: str) -> type[Attack]:
    """The class of an attack; case, ``-`` and ``_`` in its name do not matter.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> find("TaCT").name, find("adaptive-blend").name
        ('tact', 'adaptive_blend')
    """
    spelled = {_letters(known): kind for known, kind in _ATTACKS.items()}
    if not isinstance(name, str) or _letters(name) not in spelled:
        expected = f"one of {', '.join(names())}"
        raise ValueError(message("attacks", "attack", expected, repr(name), "choose one, or pass an Attack object"))
    return spelled[_letters(name)]


def _letters(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def get(name: str, **options: Any) -> Attack:
    """An attack by name, with its options (the fields of its class).

    Raises:
        ValueError: an unknown name, or an option out of its range.
        TypeError: an unknown option.

    Example:
        >>> get("blended", alpha=0.1).alpha
        0.1
    """
    kind = find(name)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            expected = f"options among {', '.join(known)}"
            raise TypeError(
                message(f"attacks.{kind.name}", option, expected, f"an option `{option}`", "check its name")
            )
    return kind(**{option: plain_number(value) for option, value in options.items()})
