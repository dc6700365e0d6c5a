"""Studies of a defense on small data: which cells are measured, what is written, and that the next call goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bdfast
from benchmarks import advrbd_small, environment, pad_ft_small, study
from benchmarks.study import Cell, Record, SmallData, Study

TINY = SmallData(
    "tiny",
    lambda: bdfast.data.load("digits", limit=(200, 60)),
    study.DIGITS.build,
    lambda seed: replace(study.DIGITS.training(seed), epochs=2),
)
SHORT = {"warm_up_epochs": 1, "epochs": 1, "content_networks": 2, "content_epochs": 1, "rounds": 1, "steps": 1}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A study sets the number of torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def judged(of: Study, cell: Cell) -> Record:
    attack, seed, variant = cell
    return {"attack": attack, "seed": seed, "variant": variant, "rate": float("nan")}


def counted() -> Study:
    """A study whose cells cost nothing."""
    return replace(
        pad_ft_small.made(None),
        data=TINY,
        judge=judged,
        table=lambda records: (("cell",), [(f"{r['attack']} {r['seed']} {r['variant']}",) for r in records]),
    )


def options(path: Path, *words: str) -> Any:
    return study.parser("", pad_ft_small.VARIANTS).parse_args([*words, "--output", str(path)])


def test_it_stops_goes_on_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    few = ("--attacks", "badnets", "blended", "--seeds", "0", "--variants", "paper")
    assert counted().run(options(path, *few, "--budget-minutes", "0"), ["first"]) == 1
    assert json.loads(path.read_text())["complete"] is False
    assert "**Partial**" in path.with_suffix(".md").read_text()
    assert counted().run(options(path, *few), ["second"]) == 0
    more = ("--attacks", "badnets", "--seeds", "0", "--variants", "robust", "paper")
    assert counted().run(options(path, *more), ["third"]) == 0
    result = json.loads(path.read_text())
    assert (result["kind"], result["complete"], result["commands"]) == (
        "pad_ft_tiny",
        True,
        ["first", "second", "third"],
    )
    assert [(r["attack"], r["variant"]) for r in result["records"]] == [
        ("badnets", "paper"), ("blended", "paper"), ("badnets", "robust"),
    ]  # fmt: skip
    assert result["records"][0]["rate"] is None
    text = path.with_suffix(".md").read_text()
    assert "**Partial**" not in text
    assert text.index("| badnets 0 robust |") < text.index("| blended 0 paper |")  # as listed, not as measured
    assert "    second\n    third\n" in text


def test_an_attack_that_the_data_do_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--attacks: expected some of badnets, .*, got sig"):
        counted().run(options(tmp_path / "x.json", "--attacks", "sig"), ["command"])
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("made", [advrbd_small.made, pad_ft_small.made])
def test_published_results_are_read_and_written_again(made: Any, tmp_path: Path) -> None:
    of = made(None)
    published = environment.RESULTS / f"{of.name}.json"
    path = tmp_path / published.name
    path.write_bytes(published.read_bytes())
    before = json.loads(path.read_text())
    assert of.run(options(path, "--budget-minutes", "0"), ["command"]) in (0, 1)
    after = json.loads(path.read_text())
    assert after["records"] == before["records"]
    assert before["environment"]["command"] in after["commands"]
    lines = path.with_suffix(".md").read_text().splitlines()
    assert sum(line.startswith(("| badnets", "| blended", "| wanet", "| tact", "| none")) for line in lines) == len(
        after["records"]
    )


def test_cells_of_advrbd() -> None:
    of = replace(
        advrbd_small.made(None), data=TINY, config=lambda **changes: advrbd_small.subset_config(**{**SHORT, **changes})
    )
    records = [of.judge(of, ("badnets", 0, variant)) for variant in ("undefended", "undefended, clean data", "oracle")]
    assert all(0 <= r["after"]["acc"] <= 100 and 0 <= r["after"]["asr"] <= 100 for r in records)
    assert records[2]["rounds"][0]["purity"] == 1.0  # truly clean ones
    assert 0 <= records[2]["retention_min"] <= records[2]["retention_target"] <= 1
    _, rows = of.table(of.ordered(records))
    assert [row[2] for row in rows] == ["undefended", "undefended, clean data", "oracle"]


def test_what_content_tells_is_recorded() -> None:
    of = replace(advrbd_small.made(None), data=TINY)
    _, poisoned = of.poisoned("badnets", 0)
    margins = torch.where(poisoned.is_poisoned, -1.0, 1.0)
    result = SimpleNamespace(content=margins)
    share = 1 - float(poisoned.is_poisoned.double().mean())
    assert advrbd_small.told_by_content(result, poisoned) == {"recognised": share, "content_auroc": 1.0}  # type: ignore[arg-type]
    result.content = None
    assert advrbd_small.told_by_content(result, poisoned) == {}  # type: ignore[arg-type]


def test_without_poison_the_training_set_is_the_clean_one() -> None:
    of = replace(advrbd_small.made(None), data=TINY)
    data, poisoned = of.poisoned("none", 0)
    assert not bool(poisoned.is_poisoned.any())
    assert torch.equal(poisoned.images, data.train[0])
    assert torch.equal(poisoned.labels, data.train[1])
    data, poisoned = of.poisoned("wanet, target 3", 0)
    assert set(poisoned.labels[poisoned.is_poisoned].tolist()) == {3}


def test_cells_of_pad_ft_share_a_victim(monkeypatch: pytest.MonkeyPatch) -> None:
    of = replace(pad_ft_small.made(None), data=TINY, config=pad_ft_small.PadFTConfig.for_digits)
    of = replace(of, config=lambda **changes: pad_ft_small.PadFTConfig.for_digits(**{**changes, "k": 5}))
    asked = list(of.cells(["badnets"], [0], ["paper", "robust"]))
    trained: list[int] = []
    train = pad_ft_small.train_classifier
    monkeypatch.setattr(pad_ft_small, "train_classifier", lambda *a, **k: (trained.append(1), train(*a, **k))[1])
    records = [of.judge(of, cell) for cell in asked]
    assert trained == [1]
    assert records[0]["before"] == records[1]["before"]
    assert records[0]["selected"] == 50
    assert 40 < records[1]["selected"] <= 50  # a class that was split may have fewer
