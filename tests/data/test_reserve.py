"""The clean reserve: sizes, determinism, BackdoorBench's draw, and index files."""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdfast.data import read_index, reserve, write_index
from bdfast.errors import LabelRangeError

LABELS = torch.arange(100) % 4


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 200), ratio=st.floats(0.01, 1.0), seed=st.integers(0, 2**31))
def test_backdoorbench_draw_is_random_sample_after_seed(size: int, ratio: float, seed: int) -> None:
    if int(size * ratio) == 0:
        return
    state = random.getstate()
    try:
        random.seed(seed)
        expected = random.sample(range(size), int(size * ratio))
    finally:
        random.setstate(state)
    chosen = reserve(torch.zeros(size, dtype=torch.int64), ratio=ratio, seed=seed, draw="backdoorbench")
    assert chosen.tolist() == expected


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=60), seed=st.integers(0, 2**31), data=st.data())
def test_draws_are_distinct_repeatable_and_of_the_size_asked(labels: list[int], seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(labels)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # empty classes are another test's subject
        chosen = reserve(torch.tensor(labels), count=count, seed=seed)
        again = reserve(torch.tensor(labels), count=count, seed=seed)
        prefix = reserve(torch.tensor(labels), count=max(count - 1, 1), seed=seed)
    assert chosen.dtype == torch.int64
    assert len(set(chosen.tolist())) == count
    assert set(chosen.tolist()) <= set(range(len(labels)))
    assert torch.equal(chosen, again)
    assert torch.equal(chosen[: len(prefix)], prefix), "a larger reserve contains the smaller one"


def test_seeds_differ_and_the_order_is_that_of_the_draw() -> None:
    first, second = reserve(LABELS, count=50, seed=0), reserve(LABELS, count=50, seed=1)
    assert not torch.equal(first, second)
    assert not torch.equal(first, first.sort().values)


def test_ratio_rounds_down() -> None:
    assert len(reserve(LABELS, ratio=0.299)) == 29
    assert len(reserve(LABELS, ratio=1.0)) == 100


def test_per_class_counts_and_ratios() -> None:
    labels = torch.tensor([5] * 10 + [2] * 30)
    chosen = reserve(labels, count=4, per_class=True)
    assert labels[chosen].tolist() == [2] * 4 + [5] * 4
    chosen = reserve(labels, ratio=0.5, per_class=True)
    assert labels[chosen].bincount().tolist() == [0, 0, 15, 0, 0, 5]
    assert len(set(chosen.tolist())) == 20


def test_data_is_taken_for_its_labels() -> None:
    data = (torch.zeros(100, 1, 2, 2), LABELS)
    assert torch.equal(reserve(data, count=9), reserve(LABELS, count=9))


def test_labels_in_an_array_or_a_list() -> None:
    labels = torch.arange(40) % 4
    expected = reserve(labels, count=12, seed=3)
    for form in (labels.numpy().astype(np.int32), labels.tolist(), list(labels.numpy())):
        assert torch.equal(reserve(form, count=12, seed=3), expected)


def test_an_empty_class_is_named() -> None:
    with pytest.warns(UserWarning, match=r"reserve: no sample of class \[1, 7\] was drawn"):
        reserve(torch.tensor([0] * 10 + [1, 7]), ratio=0.1, per_class=True)
    with pytest.warns(UserWarning, match="no sample of class"):
        reserve(LABELS, count=3)


@pytest.mark.parametrize("draw", ["permutation", "backdoorbench"])
def test_global_random_states_are_left_alone(draw: str) -> None:
    before = random.getstate(), torch.get_rng_state()
    reserve(LABELS, count=60, draw=draw)  # type: ignore[arg-type]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "`ratio, count` expected one of the two, got ratio=None, count=None"),
        ({"ratio": 0.5, "count": 3}, "expected one of the two, got ratio=0.5, count=3"),
        ({"ratio": 0.0}, r"`ratio` expected a number in \(0, 1\], got 0.0"),
        ({"ratio": 1.5}, r"`ratio` expected a number in \(0, 1\], got 1.5"),
        ({"ratio": float("nan")}, "got nan"),
        ({"ratio": 0.001}, "`ratio` expected at least one sample drawn, got 0.001 of 100"),
        ({"count": 0}, "`count` expected a whole number, at least 1, got 0"),
        ({"count": 101}, "`count` expected at most 100, all of the set, got 101"),
        ({"count": 26, "per_class": True}, "`count` expected at most 25, all of class 0, got 26"),
        ({"count": 5, "draw": "sorted"}, "`draw` expected 'permutation' or 'backdoorbench', got 'sorted'"),
        ({"count": 5, "draw": "backdoorbench", "per_class": True}, "`per_class` expected False with"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        reserve(LABELS, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "labels", [torch.zeros(3, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.rand(4)]
)
def test_what_is_not_labels(labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"`labels_or_data` expected integer labels \[N\]"):
        reserve(labels, count=1)


@settings(max_examples=30, deadline=None)
@given(indices=st.lists(st.integers(0, 2**62), min_size=1, max_size=50, unique=True))
def test_index_files_round_trip(tmp_path_factory: pytest.TempPathFactory, indices: list[int]) -> None:
    path = tmp_path_factory.mktemp("index") / "index.txt"
    write_index(path, torch.tensor(indices))
    assert read_index(path).tolist() == indices
    assert np.loadtxt(path, dtype=int, ndmin=1).tolist() == indices, "as BackdoorBench reads it"
    assert [child.name for child in path.parent.iterdir()] == ["index.txt"]


@pytest.mark.parametrize("text", ["3\n1\n2", "3\n1\n2\n", "3\n1\n2\n\n", "3\r\n1\r\n2\r\n", " 3 \n1\n2\n \n"])
def test_line_ends_and_blank_last_lines(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.txt").write_bytes(text.encode())
    assert read_index(tmp_path / "index.txt", size=4).tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", ValueError, "index.txt` expected at least one index, got none"),
        ("1\n\n2\n", ValueError, "index.txt, line 2` expected one integer, got ''"),
        ("1\n2.0\n", ValueError, "line 2` expected one integer, got '2.0'"),
        ("1 2\n", ValueError, "line 1` expected one integer, got '1 2'"),
        ("٣\n", ValueError, "line 1` expected one integer"),
        ("1" * 5000, ValueError, "line 1` expected one integer"),
        ("1\n2\n1\n", ValueError, "index.txt` expected every index once, got 1 twice"),
        ("1\n-1\n", LabelRangeError, r"expected indices in \[0, 10\), got -1; check that the file belongs"),
        ("1\n10\n", LabelRangeError, r"expected indices in \[0, 10\), got 10"),
        ("9999999999999999999\n", LabelRangeError, "got 9999999999999999999"),
    ],
)
def test_wrong_index_files(tmp_path: Path, text: str, error: type[Exception], says: str) -> None:
    (tmp_path / "index.txt").write_text(text, encoding="utf-8")
    with pytest.raises(error, match=says):
        read_index(tmp_path / "index.txt", size=10)


def test_indices_out_of_range_are_index_errors_and_value_errors(tmp_path: Path) -> None:
    (tmp_path / "index.txt").write_text("-5\n")
    for kind in (IndexError, ValueError):
        with pytest.raises(kind, match="expected indices of at least 0, got -5"):
            read_index(tmp_path / "index.txt")


def test_missing_index_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"index.txt` expected an index file, got no such file"):
        read_index(tmp_path / "index.txt")


def test_write_index_refuses_what_it_could_not_read_back(tmp_path: Path) -> None:
    path = tmp_path / "index.txt"
    for indices, error, says in (
        (torch.tensor([1.0]), TypeError, "`indices` expected integers, got torch.float32"),
        (torch.tensor([True]), TypeError, "pass mask.nonzero"),
        (torch.tensor([[1]]), ValueError, r"expected \[n\], got \[1, 1\]"),
        (torch.tensor([2, 2]), ValueError, "got 2 twice"),
        (torch.tensor([-2]), LabelRangeError, "got -2"),
        (torch.tensor([], dtype=torch.int64), ValueError, "got none"),
    ):
        with pytest.raises(error, match=says):
            write_index(path, indices)
    assert not path.exists()


def test_write_index_keeps_the_old_file_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index.txt"
    write_index(path, torch.tensor([4]))

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_index(path, torch.tensor([5]))
    assert path.read_text() == "4\n"
    assert len(list(tmp_path.iterdir())) == 1
