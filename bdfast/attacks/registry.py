"""Attacks by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from bdfast.attacks.badnets import BadNets
from bdfast.attacks.base import Attack
from bdfast.attacks.blended import Blended
from bdfast.attacks.lf import LF
from bdfast.attacks.sig import SIG
from bdfast.attacks.tact import TaCT
from bdfast.attacks.wanet import WaNet
from bdfast.errors import message

_ATTACKS: dict[str, type[Attack]] = {attack.name: attack for attack in (BadNets, Blended, LF, SIG, TaCT, WaNet)}


def names() -> tuple[str, ...]:
    """The names that :func:`get` and :func:`bdfast.attacks.poison` know, sorted.

    Example:
        >>> names()
        ('badnets', 'blended', 'lf', 'sig', 'tact', 'wanet')
    """
    return tuple(sorted(_ATTACKS))


def get(name: str, **options: Any) -> Attack:
    """An attack by name, with its options (the fields of its class).

    Raises:
        ValueError: an unknown name, or an option out of its range.
        TypeError: an unknown option.

    Example:
        >>> get("blended", alpha=0.1).alpha
        0.1
    """
    if name not in _ATTACKS:
        expected = f"one of {', '.join(names())}"
        raise ValueError(message("attacks", "attack", expected, repr(name), "choose one, or pass an Attack object"))
    kind = _ATTACKS[name]
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            expected = f"options among {', '.join(known)}"
            raise TypeError(message(f"attacks.{name}", option, expected, f"an option `{option}`", "check its name"))
    return kind(**options)
