"""What the commands load: data sets, checkpoints, and the folder that ``bdfast attack`` leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bdfast import models
from bdfast.attacks import PoisonedData, TriggeredData
from bdfast.cli.settings import MAX_CONFIG_BYTES, Given, setting
from bdfast.data import FAMILIES, DataSplits, load, load_calibrated, normalization, read_index, reserve, shift
from bdfast.errors import message
from bdfast.metrics import Metrics, accuracy, evaluate, predict
from bdfast.models.registry import size_of
from bdfast.nn import clip_activations
from bdfast.runtime.checkpoints import load_into, load_state

MODEL_FILE, POISONED_FILE, CONFIG_FILE = "model.safetensors", "poisoned.npz", "config.json"
CONDITIONS = tuple(family for family in FAMILIES if family not in ("seen", "unseen"))
CLIPS, BOUND = "clips.", ".bound"  # around the name of a site, in the state dict of a clipped model

Normalization = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class DataSettings:
    """Which images."""

    data: str = setting("digits", "digits, cifar10 (found through BDFAST_DATA), an .npz file or a folder of images")
    limit: tuple[int, int] | None = setting(None, "most training and test images to keep, such as 5000,1000")
    image_size: tuple[int, int] | None = setting(None, "height,width in pixels to resize to")
    split_seed: int = setting(0, "seed of the train/test split, for data without a test set")

    def load(self) -> DataSplits:
        """Train and test set, and the names of the classes."""
        return load(self.data, limit=self.limit, seed=self.split_seed, image_size=self.image_size)


@dataclass(frozen=True)
class ModelSettings:
    """Which network, and where it runs."""

    model: str | None = setting(
        None, "checkpoint: .safetensors, a file of torch.save, or a folder of results; code in it is never run"
    )
    arch: str | None = setting(None, "architecture, if the checkpoint does not say, such as preact_resnet18")
    normalize: str = setting(
        "auto",
        "'none', the name of a data set, or MEAN/STD such as 0.5,0.5,0.5/0.2,0.2,0.2; auto: what the checkpoint says, "
        "else that of --data",
    )
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")


@dataclass(frozen=True)
class LoadedModel:
    """A network with the weights of a checkpoint.

    Attributes:
        model: on its device, in eval mode; it expects normalised images if ``normalize`` says so.
        arch: its name.
        normalize: ``(mean, std)``, or None.
        metadata: what a copy of the checkpoint is to say about the model.
    """

    model: nn.Module
    arch: str
    normalize: Normalization | None
    metadata: dict[str, Any]


@dataclass(frozen=True)
class AttackFolder:
    """The results of ``bdfast attack``: the victim, the poisoned set with its trigger, and the settings."""

    path: Path
    poisoned: PoisonedData
    settings: dict[str, Any]

    def given(self) -> list[Given]:
        """The victim, and which images it was made from, as settings that others win over."""
        source = str(self.path / CONFIG_FILE)
        names = [item.name for item in fields(DataSettings) if item.name in self.settings]
        images = [Given(f"{source}: {name}", name, self.settings[name]) for name in names]
        return [Given("--attack-dir", "model", str(self.path / MODEL_FILE)), *images]


def read_attack_folder(where: str, path: Path) -> AttackFolder:
    """Open a folder of ``bdfast attack``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    expected, remedy = "a folder made by `bdfast attack`", "check the path, or run the attack to its end"
    for name in (POISONED_FILE, CONFIG_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(message(where, "--attack-dir", expected, f"no {name} in {path}", remedy))
    config = path / CONFIG_FILE
    try:
        text = config.read_text(encoding="utf-8") if config.stat().st_size <= MAX_CONFIG_BYTES else ""
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(message(where, "--attack-dir", expected, f"a damaged {config}", remedy)) from error
    if not isinstance(settings, dict) or settings.get("command") != "attack":
        raise ValueError(message(where, "--attack-dir", expected, f"other settings in {config}", remedy))
    return AttackFolder(path, PoisonedData.load(path / POISONED_FILE), settings)


def choose_device(where: str, name: str) -> torch.device:
    """The device of a name; ``auto`` is the GPU if there is one, under torchrun that of the process."""
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        return device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        got = f"{name!r} ({str(error).splitlines()[0]})"
        raise ValueError(message(where, "--device", "a device of this machine", got, "pass cpu or auto")) from error


def parse_normalize(where: str, text: str, data: str, said: object = None) -> Normalization | None:
    """``(mean, std)`` from a setting; ``auto`` takes what a checkpoint ``said``, else what belongs to ``data``.

    Example:
        >>> parse_normalize("example", "0.5/0.25", "digits"), parse_normalize("example", "auto", "photos")
        (((0.5,), (0.25,)), None)
    """
    if text == "none":
        return None
    if text == "auto" and said is not None:
        if not isinstance(said, str):  # a file may hold anything there, also what never ends when shown
            got, remedy = f"a {type(said).__name__} in the checkpoint", "pass --normalize"
            raise ValueError(message(where, "--normalize", "text", got, remedy))
        return parse_normalize(where, said, data)
    if text == "auto":
        return tuple(normalization(data)) if data in ("digits", "cifar10") else None  # type: ignore[return-value]
    mean, slash, std = text.partition("/")
    if not slash:
        return tuple(normalization(text))  # type: ignore[return-value]
    try:
        return _numbers(mean), _numbers(std)
    except ValueError as error:
        expected = "none, auto, the name of a data set, or MEAN/STD"
        raise ValueError(message(where, "--normalize", expected, repr(text), "write 0.5/0.25, say")) from error


def format_normalize(normalize: Normalization | None) -> str:
    """The text that :func:`parse_normalize` reads back."""
    return "none" if normalize is None else "/".join(",".join(map(str, part)) for part in normalize)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(item) for item in text.split(","))


def load_model(where: str, settings: ModelSettings, splits: DataSplits, data: str) -> LoadedModel:
    """Read a checkpoint, build its architecture and fill in the weights, strictly.

    The architecture is what ``--arch`` says, else ``model_name`` of the checkpoint (BackdoorBench's word for it).

    Raises:
        FileNotFoundError, ValueError: no such file, an unreadable one, or weights that do not fit the architecture.
    """
    if settings.model is None:
        raise ValueError(message(where, "--model", "a checkpoint", "none", "pass --model FILE or --attack-dir DIR"))
    path = Path(settings.model)
    path = path / MODEL_FILE if (path / MODEL_FILE).is_file() else path  # a folder that a command has written
    checkpoint = load_state(path)
    arch = settings.arch or checkpoint.metadata.get("model_name")
    if not isinstance(arch, str):
        got = f"none, and {settings.model} does not say"
        remedy = f"pass --arch, one of {', '.join(models.names())}"
        raise ValueError(message(where, "--arch", "the name of an architecture", got, remedy))
    normalize = parse_normalize(where, settings.normalize, data, checkpoint.metadata.get("normalize"))
    images = splits.test[0]
    size = (images.shape[2], images.shape[3])
    bounds = [name for name in checkpoint.state if name.startswith(CLIPS) and name.endswith(BOUND)]
    weights = {name: value for name, value in checkpoint.state.items() if name not in bounds}
    model: nn.Module
    known = size_of(arch, weights)
    if known is not None:
        channels, classes = known
        if images.shape[1] != channels:
            raise wrong_data(where, f"images [{channels}, H, W], as {path} takes", str(list(images.shape[1:])), data)
        if len(splits.class_names) > classes:
            raise wrong_data(where, f"at most the {classes} classes of {path}", str(len(splits.class_names)), data)
    if arch.replace("preactresnet", "preact_resnet") in models.names():
        model = models.from_state(arch, weights, image_size=size)
    else:
        model = models.build(arch, num_classes=len(splits.class_names), image_size=size, channels=images.shape[1])
    if bounds:  # a network that PAD-FT clipped
        sites = [name[len(CLIPS) : -len(BOUND)] for name in bounds]
        model = clip_activations(model, sites, example=torch.zeros(1, *images.shape[1:]))
    load_into(model, checkpoint.state, str(path))
    model.to(choose_device(where, settings.device)).eval()
    metadata = {"model_name": arch, "num_classes": len(splits.class_names), "normalize": format_normalize(normalize)}
    return LoadedModel(model, arch, normalize, metadata)


def wrong_data(where: str, expected: str, got: str, data: str) -> ValueError:
    """An error over images that do not go with a model: most often those that are loaded where nothing is said."""
    source = f"{data}, the default" if data == DataSettings.data else data
    remedy = "pass --data with the data set that the model was trained on"
    return ValueError(message(where, "--data", expected, f"{got} ({source})", remedy))


def reserve_index(
    splits: DataSplits, amount: int | float | str, seed: int, draw: Literal["permutation", "backdoorbench"]
) -> Tensor:
    """The clean training samples that a defense is given: a count, a share, or the ones of an index file."""
    labels = splits.train[1]
    if isinstance(amount, str):
        return read_index(amount, size=len(labels))
    if isinstance(amount, int):
        return reserve(labels, count=amount, seed=seed, draw=draw)
    return reserve(labels, ratio=amount, seed=seed, draw=draw)


def auxiliary_set(
    splits: DataSplits,
    index: Tensor,  # [n]
    source: str,
    seed: int,
    amount: int | float | str,
) -> tuple[Tensor, Tensor]:
    """The reserve in another condition, or images from elsewhere, of the same size and classes.

    Args:
        splits: of the victim's data.
        index: the reserve in its training set.
        source: one of :data:`CONDITIONS`, a data set, or a folder that ``bdfast defend gic`` wrote.
        seed: of the condition, and of the draw from another data set.
        amount: how much of another data set.

    Raises:
        ValueError: images of another kind, or more classes than the data has.
    """
    if source in CONDITIONS:
        return shift(splits.train[0][index], source, seed=seed), splits.train[1][index]  # type: ignore[arg-type]
    if source not in ("digits", "cifar10") and not Path(source).exists():
        kinds = f"one of {', '.join(CONDITIONS)}, a data set or a folder of `bdfast defend gic`"
        raise FileNotFoundError(message("bdfast defend", "--auxiliary", kinds, repr(source), "check the spelling"))
    if (Path(source) / "images.npy").is_file():
        images, labels = load_calibrated(source)[:2]
    else:
        height, width = splits.test[0].shape[2:]
        other = load(source, image_size=(height, width))
        chosen = reserve_index(other, amount, seed, "permutation")
        images, labels = (part[chosen] for part in other.train)
    expected, got = splits.test[0].shape[1:], images.shape[1:]
    if expected != got or int(labels.max()) >= len(splits.class_names):
        said = f"{list(got)} with labels up to {int(labels.max())} in {source}"
        kind = f"images {list(expected)} of {len(splits.class_names)} classes"
        raise ValueError(message("bdfast defend", "--auxiliary", kind, said, "convert them first"))
    return images, labels


def judge(
    model: nn.Module,
    splits: DataSplits,
    attack: PoisonedData | TriggeredData | None,
    normalize: Normalization | None,
) -> Metrics:
    """The rates of a model on the test set; without a known trigger the accuracy alone."""
    if attack is not None:
        triggered = attack.trigger(*splits.test) if isinstance(attack, PoisonedData) else attack
        return evaluate(model, splits.test, triggered, normalize=normalize)
    images, labels = splits.test
    predictions = predict(model, images, normalize=normalize)
    return Metrics(
        acc=accuracy(predictions.classes, labels),
        asr=float("nan"),
        n_clean=len(labels),
        n_nonfinite=int((~predictions.finite).sum()),
    )
