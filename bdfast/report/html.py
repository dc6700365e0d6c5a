"""One HTML file: text, tables and the picture, without a link to anywhere."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from bdfast.errors import MissingExtraError, printable
from bdfast.files import atomic_write
from bdfast.metrics import Metrics, defense_effectiveness_rating
from bdfast.report.content import Report
from bdfast.report.picture import draw

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #f5f7fa; margin: 0 }
main { max-width: 60rem; margin: 2rem auto; padding: 1.5rem 2.5rem 2rem; background: #fff;
  border: 1px solid #e4e7eb; border-radius: 8px }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } p { color: #616e7c }
img { width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem 1rem .25rem 0; text-align: left; border-bottom: 1px solid #e4e7eb; vertical-align: top }
.rates th + th, .rates td { text-align: right; padding-right: 0; padding-left: 2rem }
.columns { display: flex; flex-wrap: wrap; gap: 0 4rem } code { overflow-wrap: anywhere }
"""

MEANING = (
    "ACC: accuracy on clean test images. ASR: triggered images classified as the attacker wants. RA: triggered images "
    "classified as what they are. DER: (max(0, ASR before - after) - max(0, ACC before - after) + 1) / 2. In percent."
)


def write_html(report: Report, path: str | os.PathLike[str]) -> bool:
    """Write ``report`` as a self-contained page.

    Every text is escaped; the picture is embedded.

    Returns:
        Whether the picture is in it: without matplotlib the page says that it is missing.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> page = Path(tempfile.mkdtemp()) / "report.html"
        >>> report = Report("<D3>", {"before": Metrics(0.9, 1.0), "after": Metrics(0.9, 0.0)})
        >>> _ = write_html(report, page)
        >>> "&lt;D3&gt;" in page.read_text(), "http" in page.read_text()
        (True, False)
    """
    try:
        content = base64.b64encode(draw(report)).decode()
        picture = f'<img alt="Rates before and after, and the history" src="data:image/png;base64,{content}">'
    except MissingExtraError as error:
        content, picture = "", f"<p>No picture: {escape(str(error))}</p>"
    page = _page(report, picture)
    with atomic_write(path) as file:
        file.write(page)
    return bool(content)


def _page(report: Report, picture: str) -> str:
    sections = [
        ("Settings", report.settings),
        ("Seconds", {name: f"{seconds:.2f}" for name, seconds in report.timings.items()}),
        ("Versions", report.versions),
    ]
    title = escape(printable(report.title))
    columns = "".join(f"<div><h2>{escape(name)}</h2>{_pairs(values)}</div>" for name, values in sections if values)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body><main><h1>{title}</h1>\n{_rates(report.rates)}\n"
        f'{picture}\n<div class="columns">{columns}</div></main></body></html>\n'
    )


def _rates(rates: Mapping[str, Metrics]) -> str:
    if not rates:
        return ""
    first = next(iter(rates.values()))
    rows = []
    for label, metrics in rates.items():
        der = math.nan if metrics is first else defense_effectiveness_rating(first, metrics)
        rows.append([label, *(_percent(rate) for rate in (metrics.acc, metrics.asr, metrics.ra, der))])
    head = "".join(f"<th>{name}</th>" for name in ("", "ACC", "ASR", "RA", "DER"))
    return f'<table class="rates"><tr>{head}</tr>{"".join(map(_row, rows))}</table>\n<p>{escape(MEANING)}</p>'


def _pairs(values: Mapping[str, Any]) -> str:
    return f"<table>{''.join(_row([str(name), value]) for name, value in values.items())}</table>"


def _row(cells: Sequence[Any]) -> str:
    head, *rest = cells
    body: Iterable[str] = (f"<td><code>{escape(printable(str(cell)))}</code></td>" for cell in rest)
    return f"<tr><th>{escape(printable(str(head)))}</th>{''.join(body)}</tr>"


def _percent(rate: float) -> str:
    return "-" if math.isnan(rate) else f"{100 * rate:.1f}"
