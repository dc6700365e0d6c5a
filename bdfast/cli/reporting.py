"""The report that a command leaves beside its results."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bdfast.errors import optional_import
from bdfast.report import Report, write_html, write_png

ReportKind = Literal["html", "png", "none"]


def check_report(kind: ReportKind) -> None:
    """Raise before any work if the report cannot be made; a page does without its picture."""
    if kind == "png":
        optional_import("matplotlib", extra="cli", purpose="for --report png")


def make_report(kind: ReportKind, folder: Path, report: Report) -> str | None:
    """Write the report into ``folder``, and say what is to be known about it."""
    if kind == "png":
        write_png(report, folder / "report.png")
    elif kind == "html" and not write_html(report, folder / "report.html"):
        return "matplotlib is not installed: the report has no picture (pip install 'bdfast[cli]')"
    return None
