"""Files of BackdoorBench and backdoor-toolbox: read without running what is in them, and written for them to read.

=============================  ======================================================================================
name                           what it does
=============================  ======================================================================================
:func:`load_record`            read ``record/<name>/`` and join it with its base data
:func:`save_record`            write an attack as such a folder
:func:`write_defense_result`   write a defended model into ``record/<name>/defense/<method>/``
:func:`convert`                ``attack_result.pt`` as safetensors, JSON and raw pixels
:func:`read_artefact`          the values in a file of torch.save
:func:`read_metrics`           ``<method>_df.csv``, and :func:`write_metrics` back
=============================  ======================================================================================

Hot functions of its defenses, with the same arguments and results, are in
:mod:`bdfast.integrations.backdoorbench.accelerated`; :func:`bdfast.patch.backdoorbench` puts them into its modules.

Index files (``log/index.txt``) and BackdoorBench's draw of a clean reserve are in :mod:`bdfast.data`: ``read_index``,
``write_index``, ``reserve(draw="backdoorbench")``.
"""

from bdfast.integrations.backdoorbench.accelerated import (
    AT,
    CLP_prune,
    EP_defense,
    FloodingLoss,
    LGALoss,
    Shared_PGD,
    batch_entropy,
    channel_lipschitz,
    clp_sweep,
    compute_loss_value,
    get_perturbed_image,
    given_dataloader_test,
    given_dataloader_test_asr_ra,
    projection,
)
from bdfast.integrations.backdoorbench.convert import convert
from bdfast.integrations.backdoorbench.metrics_file import read_metrics, write_metrics
from bdfast.integrations.backdoorbench.record import Record, is_record, load_record, read_record
from bdfast.integrations.backdoorbench.stored import StoredRecord, StoredSet
from bdfast.integrations.backdoorbench.writing import save_record, write_defense_result, write_record
from bdfast.untrusted import Artefact, ArtefactError, Limits, RawImage, read_artefact

__all__ = [
    "AT",
    "Artefact",
    "ArtefactError",
    "CLP_prune",
    "EP_defense",
    "FloodingLoss",
    "LGALoss",
    "Limits",
    "RawImage",
    "Record",
    "Shared_PGD",
    "StoredRecord",
    "StoredSet",
    "batch_entropy",
    "channel_lipschitz",
    "clp_sweep",
    "compute_loss_value",
    "convert",
    "get_perturbed_image",
    "given_dataloader_test",
    "given_dataloader_test_asr_ra",
    "is_record",
    "load_record",
    "projection",
    "read_artefact",
    "read_metrics",
    "read_record",
    "save_record",
    "write_defense_result",
    "write_metrics",
    "write_record",
]
