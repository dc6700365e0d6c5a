"""Reports of what a defense changed: a picture, or one HTML file that needs nothing else.

=====================  =============================================================================
name                   what it does
=====================  =============================================================================
:class:`Report`        rates before and after, history, settings, timings, versions, samples, panels
:class:`Histogram`     a panel: distributions of a score; :class:`ClassHistograms` a class each
:class:`Curves`        a panel: lines, such as ROC, or rates by round
:func:`write_html`     a self-contained page: inline style, embedded picture, no link to anywhere
:func:`write_png`      the picture alone; needs matplotlib
=====================  =============================================================================
"""

from __future__ import annotations

from bdfast.report.content import Report, Samples, pick_samples
from bdfast.report.html import write_html
from bdfast.report.panels import ClassHistograms, Curves, Histogram, Panel
from bdfast.report.picture import write_png

__all__ = [
    "ClassHistograms",
    "Curves",
    "Histogram",
    "Panel",
    "Report",
    "Samples",
    "pick_samples",
    "write_html",
    "write_png",
]
