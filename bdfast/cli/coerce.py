"""Values from text and files, brought to the types that a config's fields are annotated with."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_BITS = 1024  # of a whole number; a file can hold one that is too long to be shown
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def coerce(value: Any, hint: Any) -> Any:
    """``value`` as an instance of the annotation ``hint``.

    Text is read as ``--set`` gives it: ``none``, ``true``, ``1e-3``, ``a,b`` or JSON for lists, JSON for nested
    configs. Values from a file may have their type already; a number never becomes text, nor ``1.5`` a whole number.

    Raises:
        ValueError: it cannot be read so; :func:`describe` says how it can.

    Example:
        >>> coerce("1e-3", float), coerce("none", int | None), coerce("64,64", tuple[int, int])
        (0.001, None, (64, 64))
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _first_that_fits(value, sorted(get_args(hint), key=_specificity))
    if hint is types.NoneType:
        return _require(value is None or (isinstance(value, str) and value.lower() in ("none", "null")), None)
    if origin is Literal:
        return _literal(value, get_args(hint))
    if hint is bool:
        return _bool(value)
    if hint in (int, float):
        return _number(value, hint)
    if hint is str:
        return _require(isinstance(value, str), value)
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return _sequence(value, get_args(hint))
    if is_dataclass(hint):
        return _nested(value, hint)
    raise ValueError(value)


def describe(hint: Any) -> str:
    """What :func:`coerce` takes for ``hint``, in words.

    Example:
        >>> describe(float | Literal["auto"])
        'auto, or a number'
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        words = [describe(option) for option in sorted(arguments, key=_specificity)]
        return ", or ".join(word for word in words if word)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        count = "some" if Ellipsis in arguments or origin is not tuple else str(len(arguments))
        return f"a list of {count}: {describe(arguments[0])}"
    if is_dataclass(hint):
        return "{" + ", ".join(field.name for field in fields(hint)) + "}"
    names = {types.NoneType: "none", bool: "true|false", int: "a whole number", float: "a number", str: "text"}
    return names.get(hint, "")


def _specificity(hint: Any) -> int:
    """Unions are tried from what few texts fit to what every text fits."""
    order = (types.NoneType, bool, int, float)
    if get_origin(hint) is Literal:
        return 1
    return 2 + order.index(hint) if hint in order else 9 if hint is str else 7


def _first_that_fits(value: Any, options: Sequence[Any]) -> Any:
    for option in options:
        try:
            return coerce(value, option)
        except ValueError:
            continue
    raise ValueError(value)


def _require(condition: bool, value: Any) -> Any:
    if not condition:
        raise ValueError(value)
    return value


def _literal(value: Any, choices: Sequence[Any]) -> Any:
    for choice in choices:
        if (type(value) is type(choice) and value == choice) or (isinstance(value, str) and value == str(choice)):
            return choice
    raise ValueError(value)


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else ""
    return bool(_require(word in _TRUE + _FALSE, word in _TRUE))


def _number(value: Any, kind: type[int] | type[float]) -> int | float:
    if isinstance(value, str):
        value = kind(value)  # ValueError if it is none
    _require(isinstance(value, (int, float)) and not isinstance(value, bool), value)
    number = kind(_require(kind is float or value == int(value), value))
    return _require(isinstance(number, float) or number.bit_length() <= MAX_BITS, number)  # type: ignore[no-any-return]


def _sequence(value: Any, hints: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = json.loads(value) if value.startswith("[") else [item.strip() for item in value.split(",")]
    _require(isinstance(value, (list, tuple)), value)
    if Ellipsis in hints or len(hints) == 1:
        return tuple(coerce(item, hints[0]) for item in value)
    _require(len(value) == len(hints), value)
    return tuple(coerce(item, hint) for item, hint in zip(value, hints, strict=True))


def _nested(value: Any, kind: Any) -> Any:
    if isinstance(value, str):
        value = json.loads(_require(value.startswith("{"), value))
    _require(isinstance(value, Mapping) and set(value) <= {field.name for field in fields(kind)}, value)
    hints = get_type_hints(kind)
    return kind(**{key: coerce(item, hints[key]) for key, item in value.items()})
