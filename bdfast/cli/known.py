"""What a folder of results tells about an attack: one of ``bdfast attack``, or a record of BackdoorBench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from bdfast.attacks import PoisonedData, TriggeredData
from bdfast.cli.inputs import (
    AttackFolder,
    LoadedModel,
    ModelSettings,
    choose_device,
    format_normalize,
    load_model,
    parse_normalize,
    read_attack_folder,
    wrong_data,
)
from bdfast.cli.settings import Given
from bdfast.data import DataSplits
from bdfast.integrations.backdoorbench.record import ATTACK_RESULT, is_record, join_record, read_record
from bdfast.integrations.backdoorbench.stored import StoredRecord

_LOADABLE = ("digits", "cifar10")  # data sets that --data knows by BackdoorBench's name


@dataclass(frozen=True)
class RecordFolder:
    """A record of BackdoorBench, or what ``bdfast convert`` made of it."""

    path: Path
    stored: StoredRecord

    def is_named_by(self, model: str | None) -> bool:
        """Whether a setting means the record's own victim."""
        return model is not None and record_folder(model) == self.path

    def given(self) -> list[Given]:
        """Its victim, and its data set where that is known by name, as settings that others win over."""
        data = self.stored.clean_data
        images = [Given(f"{self.path}: clean_data", "data", data)] if data in _LOADABLE else []
        return [Given("--attack-dir", "model", str(self.path)), *images]


Folder: TypeAlias = AttackFolder | RecordFolder


@dataclass(frozen=True)
class Known:
    """What is known about an attack; all None where nothing is.

    Attributes:
        poisoned: the training set.
        triggered: test images with the trigger.
        notes: what is to be said about it.
    """

    poisoned: PoisonedData | None = None
    triggered: TriggeredData | None = None
    notes: tuple[str, ...] = ()


def record_folder(path: str) -> Path | None:
    """The folder of a record that is named by itself or by the ``attack_result.pt`` in it; None for anything else."""
    folder = Path(path).parent if Path(path).name == ATTACK_RESULT else Path(path)
    return folder if is_record(folder) else None


def find_folder(where: str, attack_dir: str | None, settings: Sequence[Given]) -> Folder | None:
    """The folder that ``--attack-dir`` names, or ``--model`` if it names a record (or the file in it).

    Raises:
        FileNotFoundError, ValueError: no such folder, or one that is refused.
    """
    model = next((item.value for item in reversed(settings) if item.key == "model"), None)
    if attack_dir is None and isinstance(model, str) and record_folder(model) is not None:
        attack_dir = model
    if attack_dir is None:
        return None
    if (folder := record_folder(attack_dir)) is not None:
        return RecordFolder(folder, read_record(folder, where=where))
    return read_attack_folder(where, Path(attack_dir))


def load_victim(
    where: str, settings: ModelSettings, splits: DataSplits, data: str, folder: Folder | None
) -> tuple[LoadedModel, Known]:
    """The model that was asked for, and what its folder knows.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_model` and ``load_record``.
    """
    if folder is None:
        return load_model(where, settings, splits, data), Known()
    if isinstance(folder, AttackFolder):
        known = Known(folder.poisoned, folder.poisoned.trigger(*splits.test))
        return load_model(where, settings, splits, data), known
    height, width, channels = folder.stored.image_shape
    shape = list(splits.test[0].shape[1:])
    if shape != [channels, height, width]:
        expected = f"images {[channels, height, width]}, the {folder.stored.clean_data} of {folder.path}"
        raise wrong_data(where, expected, str(shape), data)
    said = None if settings.normalize == "auto" else parse_normalize(where, settings.normalize, data)
    if settings.normalize == "none":
        said = (0.0,), (1.0,)
    record = join_record(folder.path, folder.stored, train=splits.train, test=splits.test, normalize=said)
    known = Known(record.train, record.triggered, record.notes)
    if not folder.is_named_by(settings.model):
        return load_model(where, settings, splits, data), known
    model = record.model.model.to(choose_device(where, settings.device))
    metadata = {
        "model_name": record.arch,
        "num_classes": record.num_classes,
        "normalize": format_normalize(record.normalize),
    }
    return LoadedModel(model, record.arch, record.normalize, metadata), known  # type: ignore[arg-type]
