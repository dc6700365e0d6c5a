"""GIC (arXiv 2502.07231). The method is in :mod:`~bdfast.defenses.gic.algorithm`; its parts are beside it.

==================  ===================================================================
file                what it holds
==================  ===================================================================
``algorithm``       the three steps, and how sure we are of them
``config``          the options, and where each default comes from
``guide``           the frozen victim: losses, and their gradients to the images
``calibrators``     the transformations g, and which one a config means
``base``            what all of them share
``sample``          x + d_i, a d for every image
``learned``         x + d and x + delta tanh(h(x)), learned over the set
``steps``           steps of descent inside a ball
``imprint``         the check that no class has been imprinted
==================  ===================================================================
"""

from __future__ import annotations

from bdfast.defenses.gic.algorithm import GICResult, gic
from bdfast.defenses.gic.base import Calibrator
from bdfast.defenses.gic.calibrators import calibrator
from bdfast.defenses.gic.config import GICConfig
from bdfast.defenses.gic.imprint import ImprintReport

__all__ = ["Calibrator", "GICConfig", "GICResult", "ImprintReport", "calibrator", "gic"]
