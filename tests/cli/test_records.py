"""Records of BackdoorBench on the command line: convert, evaluate, defend, doctor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bdfast import attacks, models
from bdfast.cli.commands import defend
from bdfast.data import load, read_index
from bdfast.integrations.backdoorbench import convert, read_artefact, read_metrics
from bdfast.integrations.backdoorbench.converted import sha256
from bdfast.metrics import evaluate
from bdfast.nn import normalized
from tests.cli.conftest import Outcome, save_digits_record

Run = Callable[..., Outcome]
BASE = ["--limit", "200,80"]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_digits_record(tmp_path_factory.mktemp("bench") / "record" / "badnet_0_1")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    from tests.untrusted.hostile import Gadget

    torch.save({"model": Gadget(Path.touch, tmp_path / "canary")}, tmp_path / "bad.pt")
    return tmp_path / "bad.pt"


@pytest.mark.parametrize("option", ["--model", "--attack-dir"])
def test_evaluate(option: str, record: Path, bdfast: Run) -> None:
    outcome = bdfast("evaluate", option, record, *BASE, "--json")
    assert outcome.code == 0, outcome.err
    rates = json.loads(outcome.out)["model"]
    _, test, _ = load("digits", limit=(200, 80))
    model = normalized(models.build("digits_cnn", num_classes=10, image_size=8, seed=0), 0.3053, 0.3759).eval()
    expected = evaluate(model, test, attacks.poison(*test, "badnets", target=3).trigger(*test))
    assert (rates["acc"], rates["asr"], rates["ra"]) == pytest.approx((expected.acc, expected.asr, expected.ra))
    assert rates["n_eligible"] == expected.n_eligible


def test_other_images_than_those_of_the_record(record: Path, bdfast: Run) -> None:
    outcome = bdfast("evaluate", "--model", record, "--image-size", "16,16")
    assert outcome.code == 2
    says = f"`--data` expected images [1, 8, 8], the digits of {record}, got [1, 16, 16] ("
    assert says in outcome.err


@pytest.fixture(scope="module")
def converted(record: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert(record, folder)
    return folder


@pytest.mark.parametrize("form", ["record", "file", "slash", "converted"])
def test_a_record_is_named_by_its_folder_or_its_file(
    form: str, record: Path, converted: Path, bdfast: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(record.parent)
    name = {
        "record": "badnet_0_1",
        "file": "badnet_0_1/attack_result.pt",
        "slash": "badnet_0_1/",
        "converted": converted,
    }
    rates = [bdfast("evaluate", option, name[form], *BASE, "--json").out for option in ("--model", "--attack-dir")]
    assert rates == [bdfast("evaluate", "--model", record, *BASE, "--json").out] * 2
    assert json.loads(rates[0])["model"]["asr"] is not None


FEW = {
    "d3": ["epochs=1"], "ft": ["epochs=1"], "ft-sam": ["epochs=1"], "pad-ft": ["clip_epochs=1", "epochs=1"],
    "gic": ["steps=1"], "gic+d3": ["gic_steps=1", "epochs=1"],
    "advrbd": ["epochs=1", "warm_up_epochs=1", "rounds=1", "steps=1", "enhance_epochs=1"],
}  # fmt: skip


@pytest.mark.parametrize("defense", FEW)
def test_every_defense_takes_a_record(defense: str, converted: Path, bdfast: Run, tmp_path: Path) -> None:
    few = [word for setting in FEW[defense] for word in ("--set", setting)]
    clean = [] if defense in ("pad-ft", "advrbd") else ["--reserve", "40"]
    words = ["--attack-dir", converted, *BASE, *few, *clean, "--report", "none", "--out", tmp_path / "out"]
    outcome = bdfast("defend", defense, *words)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / ("images.npy" if defense == "gic" else "model.safetensors")).is_file()


@pytest.mark.parametrize("score", ["sce", "advrbd"])
def test_every_score_takes_a_record(score: str, record: Path, converted: Path, bdfast: Run, tmp_path: Path) -> None:
    for number, source in enumerate((record, converted)):
        words = ["--attack-dir", source, *BASE, "--report", "none", "--out", tmp_path / f"out{number}"]
        outcome = bdfast("score", score, *words)
        assert outcome.code == 0, outcome.err
    tables = [(tmp_path / f"out{number}" / "scores.csv").read_bytes() for number in (0, 1)]
    assert tables[0] == tables[1]
    assert json.loads((tmp_path / "out0" / "summary.json").read_text())["poisoned"] == 20


def test_evaluate_needs_the_whole_base_set(record: Path, bdfast: Run) -> None:
    outcome = bdfast("evaluate", "--model", record)
    assert outcome.code == 2
    assert "`train` expected 200 images" in outcome.err


def test_convert_then_defend(record: Path, bdfast: Run, tmp_path: Path) -> None:
    assert bdfast("convert", record / "attack_result.pt", tmp_path / "converted").code == 0
    words = ["--attack-dir", tmp_path / "converted", *BASE, "--reserve", "40", "--set", "epochs=1", "--report", "none"]
    outcome = bdfast("defend", "d3", *words, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "converted" / "defense").exists()


@pytest.mark.parametrize("wrapper", ["model", "net"])
def test_convert_a_checkpoint_then_evaluate_its_folder(wrapper: str, bdfast: Run, tmp_path: Path) -> None:
    model = models.build("digits_cnn", num_classes=10, image_size=8, seed=0)
    content = {"model_name": "digits_cnn", wrapper: {f"module.{k}": v for k, v in model.state_dict().items()}}
    torch.save(content, tmp_path / "x.pt")
    assert bdfast("convert", tmp_path / "x.pt", tmp_path / "converted").code == 0
    outcomes = [bdfast("evaluate", "--model", tmp_path / name, *BASE) for name in ("x.pt", "converted")]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[1].err
    assert outcomes[0].out == outcomes[1].out


@pytest.mark.parametrize("said", [5, ["0.5", "0.5"], "endless"])
def test_a_checkpoint_says_its_normalization_in_text(said: object, bdfast: Run, tmp_path: Path) -> None:
    if said == "endless":
        said = [1]
        for _ in range(40):
            said = [said] * 10  # one list ten times
    model = models.build("digits_cnn", num_classes=10, image_size=8, seed=0)
    torch.save({"model_name": "digits_cnn", "model": model.state_dict(), "normalize": said}, tmp_path / "x.pt")
    outcome = bdfast("evaluate", "--model", tmp_path / "x.pt", *BASE)
    assert outcome.code == 2
    assert "`--normalize` expected text, got a" in outcome.err


def test_doctor_shows_nothing_that_a_terminal_obeys(bdfast: Run, tmp_path: Path) -> None:
    torch.save({"model": {"\x1b[2Ja": torch.ones(1) / 0}, "note\x1b[2J": "\x1b]0;title\x07"}, tmp_path / "x.pt")
    outcome = bdfast("doctor", "--artefact", tmp_path / "x.pt")
    assert outcome.code == 2
    assert "?[2Ja" in outcome.out
    assert "?]0;title?" in outcome.out
    assert all(line.isprintable() for line in outcome.out.splitlines())
    save_file({"\x1b[2Ja": torch.ones(1) / 0}, tmp_path / "x.safetensors", metadata={"\x1b[2J": "\x1b]0;title\x07"})
    for words in (["doctor", "--artefact"], ["evaluate", "--arch", "digits_cnn", *BASE, "--model"]):
        outcome = bdfast(*words, tmp_path / "x.safetensors")
        assert outcome.code == 2
        assert all(line.isprintable() for line in (outcome.out + outcome.err).splitlines())


@pytest.mark.parametrize("defense", ["ft", "pad-ft"])
def test_defend_into_the_record(defense: str, record: Path, bdfast: Run) -> None:
    few = ["--draw", "backdoorbench"] if defense == "ft" else ["--set", "clip_epochs=2"]
    words = ["--model", record, *BASE, *few, "--set", "epochs=1", "--report", "none", "--record"]
    outcome = bdfast("defend", defense, *words)
    assert outcome.code == 0, outcome.err
    folder = record / "defense" / defense
    result = read_artefact(folder / "defense_result.pt").value
    plain = models.build("digits_cnn", num_classes=10, image_size=8).state_dict()
    assert list(result["model"]) == list(plain)
    assert ("bdfast" in result) == (defense == "pad-ft")
    assert (result["model_name"], result["num_classes"]) == ("digits_cnn", 10)
    rows = read_metrics(folder / f"{defense}_df.csv")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert rows[-1]["test_asr"] == metrics["after"]["asr"]
    assert read_metrics(folder / f"{defense}_df_summary.csv")[0]["test_acc"] == metrics["after"]["acc"]
    if defense == "ft":
        assert read_index(folder / "log" / "index.txt").tolist() == [98, 194, 107, 10, 66, 130, 124, 103, 77, 122]
    else:
        assert "ignores them" in outcome.err


def test_interrupted_while_the_record_is_written(
    record: Path, bdfast: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then there are results, and the message does not say otherwise."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(defend, "write_into_record", stop)
    words = ["--model", record, *BASE, "--set=epochs=1", "--report=none", "--record", "--out", tmp_path]
    outcome = bdfast("defend", "ft", *words)
    assert outcome.code == 130
    assert f"interrupted: the results are in {tmp_path}, those of the record are not complete" in outcome.err
    assert (tmp_path / "model.safetensors").exists()


def test_record_option_needs_a_record(attack_dir: Path, bdfast: Run, tmp_path: Path) -> None:
    outcome = bdfast("defend", "ft", "--attack-dir", attack_dir, "--record", "--out", tmp_path)
    assert outcome.code == 2
    assert "`--record` expected a record of BackdoorBench" in outcome.err
    outcome = bdfast("defend", "ft", "--attack-dir", attack_dir)
    assert outcome.code == 2
    assert "`--out` expected a folder for the results" in outcome.err


def test_convert_refuses_code(hostile: Path, bdfast: Run, tmp_path: Path) -> None:
    outcome = bdfast("convert", hostile, tmp_path / "out")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: convert: `{hostile}: data.pkl, byte ")
    assert bdfast("convert", hostile, tmp_path / "out", "--unsafe-pickle", "0" * 64).code == 2
    assert not (tmp_path / "canary").exists()
    bdfast("convert", hostile, tmp_path / "out", "--unsafe-pickle", sha256(hostile))
    assert (tmp_path / "canary").exists()  # its user said that it may run


def test_doctor_reads_a_record(record: Path, bdfast: Run) -> None:
    outcome = bdfast("doctor", "--artefact", record, "--json")
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert (found["status"], found["findings"], found["kind"]) == ("complete", [], "a record of BackdoorBench")
    assert found["sha256"] == sha256(record / "attack_result.pt")
    assert found["claims"]["train"] == {"samples": 200, "flagged": 20, "relabelled": 20}
    text = bdfast("doctor", "--artefact", record / "attack_result.pt").out
    assert "BackdoorBench's attack_result (zip)" in text
    assert "not whether its model carries a backdoor" in text
    assert "safe" not in text.replace("safetensors", "")


def test_doctor_finds_code(hostile: Path, bdfast: Run, tmp_path: Path) -> None:
    outcome = bdfast("doctor", "--artefact", hostile)
    assert outcome.code == 1
    assert "FINDING: the file asks to run something: data.pkl" in outcome.out
    assert "status       inconclusive" in outcome.out
    assert not (tmp_path / "canary").exists()


def test_doctor_on_a_damaged_file(record: Path, bdfast: Run, tmp_path: Path) -> None:
    data = (record / "attack_result.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(data[: len(data) // 2])
    outcome = bdfast("doctor", "--artefact", tmp_path / "half.pt")
    assert outcome.code == 2
    assert "status       error" in outcome.out
    assert "refused: bdfast doctor: " in outcome.out


def test_doctor_on_other_files(bdfast: Run, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    assert "parameters   3" in bdfast("doctor", "--artefact", tmp_path / "x.pt").out
    torch.save({"a": torch.ones(3) / 0}, tmp_path / "x.pt")
    outcome = bdfast("doctor", "--artefact", tmp_path / "x.pt")
    assert (outcome.code, "not finite: a" in outcome.out) == (2, True)
    (tmp_path / "x.txt").write_text("hello, this is text")
    outcome = bdfast("doctor", "--artefact", tmp_path / "x.txt")
    assert (outcome.code, "status       inconclusive" in outcome.out) == (2, True)
    assert bdfast("doctor", "--artefact", tmp_path / "nowhere").code == 2
    assert bdfast("doctor", "--artefact", tmp_path).code == 2
