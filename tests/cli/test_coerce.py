"""Text and file values to annotated types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdfast.cli.coerce import coerce, describe
from bdfast.runtime import Augment


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("7", int, 7),
        (7.0, int, 7),
        ("1e-3", float, 0.001),
        (3, float, 3.0),
        ("yes", bool, True),
        (False, bool, False),
        ("none", int | None, None),
        (None, float | None, None),
        ("far", Literal["near", "far"], "far"),
        ("2", Literal[1, 2], 2),
        ("auto", float | Literal["auto"], "auto"),
        ("0.5", float | Literal["auto"], 0.5),
        ("140", int | float | str, 140),
        ("0.05", int | float | str, 0.05),
        ("index.txt", int | float | str, "index.txt"),
        ("5000,1000", tuple[int, int] | None, (5000, 1000)),
        ([64, 32], tuple[int, int], (64, 32)),
        ("linear, layer4", Literal["classifier"] | Sequence[str], ("linear", "layer4")),
        ("classifier", Literal["classifier"] | Sequence[str], "classifier"),
        ('["a", "b"]', tuple[str, ...], ("a", "b")),
        ('{"crop_padding": 2, "flip": false}', Augment | Literal["none"], Augment(2, False)),
        ({"flip": True}, Augment, Augment(flip=True)),
    ],
)
def test_reads(value: Any, hint: Any, expected: Any) -> None:
    result = coerce(value, hint)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("three", int),
        ("1.5", int),
        (1.5, int),
        (True, int),
        (True, float),
        ("maybe", bool),
        (1, bool),
        (3, str),
        ("5", Literal["near", "far"]),
        ("1,2,3", tuple[int, int]),
        (5, tuple[int, int]),
        ("a,b", tuple[int, ...]),
        ({"paddding": 1}, Augment),
        ("[1,", tuple[int, ...]),
        (["x"], float),
        ("anything", bytes),
    ],
)
def test_refuses(value: Any, hint: Any) -> None:
    with pytest.raises(ValueError):
        coerce(value, hint)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_survive_their_text(number: float) -> None:
    assert coerce(repr(number), float) == number


@given(st.lists(st.integers(), min_size=1))
def test_lists_survive_their_text(numbers: list[int]) -> None:
    assert coerce(",".join(map(str, numbers)), tuple[int, ...]) == tuple(numbers)


def test_describe() -> None:
    assert describe(Literal["a", "b"]) == "a|b"
    assert describe(int | None) == "none, or a whole number"
    assert describe(tuple[int, int]) == "a list of 2: a whole number"
    assert describe(Augment) == "{crop_padding, flip}"
