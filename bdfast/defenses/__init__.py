"""End-to-end defenses, each readable beside its paper.

=================  ==================================================================  ======================
function           what it does                                                        paper
=================  ==================================================================  ======================
:func:`d3`         leaves the backdoored weights as far as the clean loss allows       arXiv 2411.09585
:func:`fine_tune`  trains on with clean data: the baseline                             BackdoorBench's ``ft``
=================  ==================================================================  ======================
"""

from __future__ import annotations

from bdfast.defenses.d3 import D3Config, D3Result, d3
from bdfast.defenses.fine_tune import FineTuneConfig, FineTuneResult, fine_tune

__all__ = ["D3Config", "D3Result", "FineTuneConfig", "FineTuneResult", "d3", "fine_tune"]
