"""End-to-end defenses, each readable beside its paper.

=================  ==================================================================  ======================
function           what it does                                                        paper
=================  ==================================================================  ======================
:func:`advrbd`     splits the poisoned set, trains on the clean part                   arXiv 2405.12719
:func:`d3`         leaves the backdoored weights as far as the clean loss allows       arXiv 2411.09585
:func:`pad_ft`     purifies the poisoned set, clips activations, tunes the head        arXiv 2409.12072
:func:`gic`        calibrates auxiliary images for a victim; any purifier then         arXiv 2502.07231
:func:`ft_sam`     trains on with clean data, sharpness-aware                          arXiv 2304.11823
:func:`fine_tune`  trains on with clean data: the baseline                             BackdoorBench's ``ft``
=================  ==================================================================  ======================
"""

from __future__ import annotations

from bdfast.defenses.advrbd import AdvrBDConfig, AdvrBDResult, advrbd
from bdfast.defenses.d3 import D3Config, D3Result, d3
from bdfast.defenses.fine_tune import FineTuneConfig, FineTuneResult, fine_tune
from bdfast.defenses.ft_sam import FTSAMConfig, FTSAMResult, ft_sam
from bdfast.defenses.gic import Calibrator, GICConfig, GICResult, ImprintReport, calibrator, gic
from bdfast.defenses.pad_ft import PadFTConfig, PadFTResult, pad_ft
from bdfast.defenses.purify_with import CalibratedPurification, Purifier, purify_with
from bdfast.defenses.sce_scores import sce_scores

__all__ = [
    "AdvrBDConfig",
    "AdvrBDResult",
    "CalibratedPurification",
    "Calibrator",
    "D3Config",
    "D3Result",
    "FTSAMConfig",
    "FTSAMResult",
    "FineTuneConfig",
    "FineTuneResult",
    "GICConfig",
    "GICResult",
    "ImprintReport",
    "PadFTConfig",
    "PadFTResult",
    "Purifier",
    "advrbd",
    "calibrator",
    "d3",
    "fine_tune",
    "ft_sam",
    "gic",
    "pad_ft",
    "purify_with",
    "sce_scores",
]
