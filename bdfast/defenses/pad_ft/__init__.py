"""PAD-FT (arXiv 2409.12072). The method is in :mod:`~bdfast.defenses.pad_ft.algorithm`; its steps are beside it.

==================  ===================================================================
file                what it holds
==================  ===================================================================
``algorithm``       the three steps
``config``          the options, and where each default comes from
``run``             model, data and device of one run
``scores``          step 1: how clean each sample looks, in chunks that survive a kill
``selection``       step 1: which samples to trust, which to suspect
``bounds``          step 2: upper bounds of activations
``head``            step 3: the last linear layer
==================  ===================================================================
"""

from __future__ import annotations

from bdfast.defenses.pad_ft.algorithm import PadFTResult, pad_ft
from bdfast.defenses.pad_ft.config import PadFTConfig

__all__ = ["PadFTConfig", "PadFTResult", "pad_ft"]
