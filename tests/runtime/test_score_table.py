"""Tables of scores: order, quarantine, and files that give the same back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdfast.runtime import ScoreTable

NAN, INF = float("nan"), float("inf")


def example() -> ScoreTable:
    return ScoreTable(
        torch.tensor([5, 3, 9, 4]),
        torch.tensor([0.1, 2.0, NAN, 2.0]),
        {
            "label": torch.tensor([1, 0, -1, 2]),
            "halved": torch.tensor([False, True, False, False]),
            "confidence": torch.tensor([1 / 3, 0.5, NAN, 1e-30]),
        },
    )


def test_order() -> None:
    table = example()
    assert table.ranking().tolist() == [3, 4, 5]
    assert table.ranking(largest=False).tolist() == [5, 3, 4]
    assert table.top(2).tolist() == [3, 4]
    assert table.top(10).tolist() == [3, 4, 5]
    assert table.quarantined.tolist() == [9]


@pytest.mark.parametrize("name", ["scores.csv", "scores.npz"])
def test_files_give_the_same_back(tmp_path: Path, name: str) -> None:
    table = example()
    table.save(tmp_path / name)
    found = ScoreTable.load(tmp_path / name)
    assert torch.equal(found.ids, table.ids)
    assert torch.equal(found.scores.nan_to_num(7), table.scores.nan_to_num(7))
    assert list(found.columns) == list(table.columns)
    for key, value in table.columns.items():
        assert found.columns[key].dtype == value.dtype
        assert torch.equal(found.columns[key].nan_to_num(7), value.nan_to_num(7))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_csv_reads_like_a_table(tmp_path: Path) -> None:
    example().save(tmp_path / "scores.csv")
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0] == "id,score,label,halved,confidence"
    assert lines[2] == "3,2,0,true,0.5"
    assert lines[3] == "9,nan,-1,false,nan"


@settings(max_examples=50)
@given(st.lists(st.floats(width=32), max_size=8))
def test_every_float_survives_csv(values: list[float]) -> None:
    import tempfile

    table = ScoreTable(torch.arange(len(values)), torch.tensor(values, dtype=torch.float32))
    with tempfile.TemporaryDirectory() as folder:
        table.save(f"{folder}/scores.csv")
        found = ScoreTable.load(f"{folder}/scores.csv")
    np.testing.assert_array_equal(found.scores.numpy(), table.scores.numpy())


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
def test_auroc_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    table = ScoreTable(torch.arange(len(rows)), torch.tensor([float(score) for score, _ in rows]))
    positive, negative = ([score for score, flag in rows if flag == kind] for kind in (True, False))
    wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    got = table.auroc(torch.tensor([flag for _, flag in rows]))
    np.testing.assert_allclose(got, np.mean(wins) if wins else NAN)


def test_auroc_leaves_out_the_quarantined() -> None:
    table = ScoreTable(torch.arange(3), torch.tensor([0.0, 1.0, NAN]))
    assert table.auroc(torch.tensor([False, True, True])) == 1.0


def test_errors(tmp_path: Path) -> None:
    ids, scores = torch.arange(2), torch.zeros(2)
    with pytest.raises(ValueError, match=r"ScoreTable: `ids` expected torch.int64 \[2\], got torch.int32"):
        ScoreTable(ids.int(), scores)
    with pytest.raises(ValueError, match=r"ScoreTable: `scores` expected torch.float32 \[2\], got torch.float64"):
        ScoreTable(ids, scores.double())
    for columns in ({"id": ids}, {"more": torch.zeros(3)}, {"half": scores.half()}):
        with pytest.raises(ValueError, match=r"ScoreTable: `columns` expected bool, int64 or float32"):
            ScoreTable(ids, scores, columns)
    with pytest.raises(ValueError, match=r"ScoreTable.save: `path` expected a name that ends in .csv or .npz"):
        ScoreTable(ids, scores).save(tmp_path / "scores.pkl")
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv` expected a file, got none"):
        ScoreTable.load(tmp_path / "nowhere.csv")
    np.save(tmp_path / "scores.npy", np.zeros(2))
    (tmp_path / "scores.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "code.npz", id=np.array([print], dtype=object), score=np.zeros(1, np.float32))
    (tmp_path / "cut.csv").write_text("id,score\n1,0.5\n2\n")
    for name in ("code.npz", "array.npz", "cut.csv"):
        with pytest.raises(ValueError, match=rf"{name}` expected a table of scores, got another one"):
            ScoreTable.load(tmp_path / name)
