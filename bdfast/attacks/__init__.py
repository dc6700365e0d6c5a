"""Backdoor attacks: poison a training set, trigger a test set.

>>> import torch
>>> from bdfast import attacks
>>> images, labels = torch.rand(100, 1, 8, 8), torch.arange(100) % 10
>>> train = attacks.poison(images, labels, "badnets", rate=0.05, target=0, seed=0)
>>> len(train.poison_indices)
5
>>> test_images, attack_labels, original_labels, eligible = train.trigger(images[:20], labels[:20])
>>> int(eligible.sum())  # two of them are of the target class already
18

Defaults cite their source: [BB] BackdoorBench, [TB] backdoor-toolbox, AdvrBD its Table I. Triggers are regenerated from
their formulas.
"""

from bdfast.attacks.adaptive_blend import AdaptiveBlend
from bdfast.attacks.adaptive_patch import AdaptivePatch
from bdfast.attacks.badnets import BadNets
from bdfast.attacks.base import Attack, Rows
from bdfast.attacks.blended import Blended
from bdfast.attacks.input_aware import InputAware
from bdfast.attacks.kl_parity import Parity, kl_parity
from bdfast.attacks.kl_scores import KLScoreConfig, kl_scores
from bdfast.attacks.labels import Relabel
from bdfast.attacks.lf import LF
from bdfast.attacks.masked_pgd import MaskedPGD, masked_pgd
from bdfast.attacks.physical_ba import PhysicalBA
from bdfast.attacks.poisoned import PoisonedData, TriggeredData, poison
from bdfast.attacks.presets import preset
from bdfast.attacks.registry import get, names
from bdfast.attacks.sig import SIG
from bdfast.attacks.ssba import SSBA
from bdfast.attacks.tact import TaCT
from bdfast.attacks.wanet import WaNet

__all__ = [
    "LF",
    "SIG",
    "SSBA",
    "AdaptiveBlend",
    "AdaptivePatch",
    "Attack",
    "BadNets",
    "Blended",
    "InputAware",
    "KLScoreConfig",
    "MaskedPGD",
    "Parity",
    "PhysicalBA",
    "PoisonedData",
    "Relabel",
    "Rows",
    "TaCT",
    "TriggeredData",
    "WaNet",
    "get",
    "kl_parity",
    "kl_scores",
    "masked_pgd",
    "names",
    "poison",
    "preset",
]
