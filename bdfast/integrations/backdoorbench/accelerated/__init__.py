"""Hot functions of BackdoorBench's defenses, each with the same arguments and results, and ``BDFAST_REFERENCE=1``.

:func:`bdfast.patch.backdoorbench` puts them into a module that is already imported.
"""

from bdfast.integrations.backdoorbench.accelerated.abl import (
    FloodingLoss,
    LGALoss,
    compute_loss_value,
    isolated,
)
from bdfast.integrations.backdoorbench.accelerated.clp import CLP_prune, channel_lipschitz, clear_cache, clp_sweep
from bdfast.integrations.backdoorbench.accelerated.entropy import EP_defense, batch_entropy
from bdfast.integrations.backdoorbench.accelerated.evaluation import (
    given_dataloader_test,
    given_dataloader_test_asr_ra,
)
from bdfast.integrations.backdoorbench.accelerated.nad import AT
from bdfast.integrations.backdoorbench.accelerated.npd import get_perturbed_image, projection
from bdfast.integrations.backdoorbench.accelerated.sau import Shared_PGD

__all__ = [
    "AT",
    "CLP_prune",
    "EP_defense",
    "FloodingLoss",
    "LGALoss",
    "Shared_PGD",
    "batch_entropy",
    "channel_lipschitz",
    "clear_cache",
    "clp_sweep",
    "compute_loss_value",
    "get_perturbed_image",
    "given_dataloader_test",
    "given_dataloader_test_asr_ra",
    "isolated",
    "projection",
]
