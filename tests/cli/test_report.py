"""The report: self-contained, escaped, with or without a picture."""

from __future__ import annotations

import struct
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from bdfast.attacks import TriggeredData
from bdfast.errors import MissingExtraError
from bdfast.metrics import Metrics
from bdfast.report import ClassHistograms, Curves, Histogram, Report, Samples, pick_samples, write_html, write_png
from bdfast.report.panels import draw_row, rows_of

RATES = {"before": Metrics(0.9, 1.0, 0.0), "d3": Metrics(0.8, 0.25, 0.5)}
HISTORY = [{"epoch": e, "loss": -1.0, "hinge": 1 / e, "accuracy": 0.5, "distance": {"linear": 2.0}} for e in (1, 2)]
EVIL = "<script>alert('x')</script>&"


class Links(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]


def test_page(tmp_path: Path) -> None:
    report = Report(EVIL, RATES, HISTORY, {EVIL: EVIL}, {EVIL: 1.5}, {EVIL: EVIL})
    assert write_html(report, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    found = Links()
    found.feed(page)
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert [source[:22] for source in found.sources] == ["data:image/png;base64,"]
    assert "<td><code>82.5</code></td>" in page  # DER
    assert "1.50" in page


def test_page_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not write_html(Report("title", RATES), tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "No picture" in page
    assert "bdfast[cli]" in page
    with pytest.raises(MissingExtraError, match="matplotlib"):
        write_png(Report("title", RATES), tmp_path / "r.png")
    assert not (tmp_path / "r.png").exists()


@pytest.mark.parametrize("channels", [1, 3])
def test_picture(tmp_path: Path, channels: int) -> None:
    samples = Samples(torch.rand(2, channels, 6, 8), ("cat", "dog"), {"before": ("x", "x"), "d3": ("cat", "x")})
    write_png(Report("title", RATES, HISTORY, samples=samples), tmp_path / "r.png")
    matplotlib = pytest.importorskip("matplotlib.image")
    assert matplotlib.imread(tmp_path / "r.png").shape[1] == 1650


def test_picture_without_rates_of_triggered_images(tmp_path: Path) -> None:
    history = [{"epoch": 1, "loss": 0.5, "accuracy": 0.5}]
    nan = float("nan")
    write_png(Report("title", {"before": Metrics(0.5, nan), "ft": Metrics(0.5, nan)}, history), tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


class Constant(nn.Module):
    """Says one class, whatever it sees."""

    def __init__(self, number: int, classes: int = 4) -> None:
        super().__init__()
        self.logits = nn.Parameter(nn.functional.one_hot(torch.tensor(number), classes).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(x), -1)


def test_samples_are_eligible_and_of_all_classes() -> None:
    labels = torch.tensor([0, 1, 1, 2, 0, 2, 1])
    triggered = TriggeredData(torch.rand(7, 1, 4, 4), torch.zeros_like(labels), labels, labels != 0)
    samples = pick_samples({"a": Constant(1), "b": Constant(3)}, triggered, ("zero", "one", "two"), count=3)
    assert samples.truth == ("one", "two", "one")
    assert torch.equal(samples.images, triggered.images[[1, 3, 2]])
    assert samples.predictions == {"a": ("one",) * 3, "b": ("3",) * 3}  # a class that the data has no name for


def test_names_are_neither_formulas_nor_commands(tmp_path: Path) -> None:
    name = "$\\foo$ \x1b[2J\udcff"  # a folder may be called so
    rates = {"$\\foo$": RATES["before"]}
    samples = Samples(torch.rand(1, 1, 6, 8), ("$\\frac$",), {"before": ("a$b",)})
    curves = Curves("$\\foo$", "$", "$$", {"$\\bar$": ([0, 1], [0, 1])})
    report = Report(name, rates, HISTORY, {name: name}, samples=samples, panels=[curves])
    assert write_html(report, tmp_path / "r.html")
    assert "?[2J?" in (tmp_path / "r.html").read_text(encoding="utf-8")
    write_png(report, tmp_path / "r.png")


PANELS = [
    Histogram("scores", "KL", {"clean": torch.tensor([0.0, 1.0, float("nan")]), "poisoned": torch.tensor([2.0])}),
    ClassHistograms(
        "margins",
        "nats",
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([0, 0, 25]),
        {"all": torch.ones(3).bool()},
        ("a",),
    ),
    Curves("ROC", "FPR", "TPR", {"kl": ([0, 1], [0, 1])}, diagonal=True),
]


def test_panels_share_rows_in_their_order() -> None:
    curves = PANELS[2]
    rows = [row for row, _ in rows_of([PANELS[0], *PANELS[1:], curves])]
    assert rows == [[PANELS[0]], [PANELS[1]], [curves, curves]]


def test_a_report_of_panels_alone(tmp_path: Path) -> None:
    assert write_html(Report("scores", panels=PANELS), tmp_path / "r.html")
    assert "ACC" not in (tmp_path / "r.html").read_text()
    write_png(Report("scores", panels=PANELS), tmp_path / "panels.png")
    write_png(Report("scores", RATES, HISTORY), tmp_path / "rates.png")
    sizes = {path.stem: struct.unpack(">II", path.read_bytes()[16:24]) for path in tmp_path.glob("*.png")}
    assert sizes["panels"] == (1650, int(150 * (0.6 + 3.2 + 0.9 + 1.5 + 3.2)))
    assert sizes["rates"] == (1650, int(150 * 4.5))


def test_of_many_classes_those_with_most_of_the_last_group_are_drawn() -> None:
    classes = torch.arange(40).repeat(2)
    bad = classes >= 30
    panel = ClassHistograms("t", "x", torch.rand(80), classes, {"good": ~bad, "bad": bad}, ())
    figure = Figure()
    draw_row(figure, [panel])
    titles = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert len(titles) == 20
    assert titles[-10:] == [str(c) for c in range(30, 40)]


def test_stages_of_one_kind_are_drawn_alike_and_named_once() -> None:
    import matplotlib.figure

    from bdfast.report.picture import _draw_history

    stages = ["warm_up", *(f"content {i}" for i in range(9)), "look 0.0", "look 0.1", "clean"]
    pairs = [(stage, epoch) for stage in stages for epoch in (0, 1)]
    history = [
        {"stage": stage, "epoch": 1 + i, "loss": 0.5, "accuracy": 0.5 + 0.1 * e} for i, (stage, e) in enumerate(pairs)
    ]
    axes = matplotlib.figure.Figure().subplots(2)
    _draw_history(axes, history)
    assert len(axes[0].lines) == len(stages)
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["warm_up", "content", "look", "clean"]
    assert len({line.get_color() for line in axes[0].lines}) == 4
