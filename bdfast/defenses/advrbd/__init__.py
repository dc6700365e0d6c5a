"""AdvrBD (arXiv 2405.12719). The method is in :mod:`~bdfast.defenses.advrbd.algorithm`; its steps are beside it.

==================  ===================================================================
file                what it holds
==================  ===================================================================
``algorithm``       the six steps
``config``          the options, and where each default comes from
``run``             model factory, data, folder and seeds of one run
``partition``       step 2: what goes to D_c
``content``         content margins: do networks that never saw a class know its samples
``enhancement``     step 3: down on D_u, up on D_c
``identification``  step 4: what is held to be clean
``quality``         with ground truth, how good the split is
==================  ===================================================================
"""

from __future__ import annotations

from bdfast.defenses.advrbd.algorithm import AdvrBDResult, advrbd
from bdfast.defenses.advrbd.config import AdvrBDConfig

__all__ = ["AdvrBDConfig", "AdvrBDResult", "advrbd"]
