"""What AdvrBD works with: the set, networks fresh from the factory, and stages that survive a kill.

Every stage is deterministic and keeps what it did in the checkpoint's folder: training after every epoch, scores after
every chunk, content margins network by network. A run that is taken up again goes through all stages; those that are
complete cost a look at their file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdfast.attacks.kl_scores import KLScoreConfig, kl_scores
from bdfast.data import as_tensors, check_labels
from bdfast.data.source import to_floats
from bdfast.defenses.advrbd.config import AdvrBDConfig
from bdfast.defenses.advrbd.content import ContentView, RandomErasing, content_margins, dealt, recognised
from bdfast.defenses.advrbd.contrast import contrast, halves, own_logits
from bdfast.defenses.advrbd.enhancement import enhancement
from bdfast.defenses.advrbd.pairs import PairTraining, train_on_pairs, two_sides
from bdfast.defenses.advrbd.partition import random_scores, weighed
from bdfast.defenses.ground_truth import known_truth
from bdfast.defenses.last_layer import LastLayer
from bdfast.errors import message
from bdfast.files import atomic_write
from bdfast.models import classifier_layers
from bdfast.nn.normalize import Statistics, normalized, statistics
from bdfast.runtime.determinism import deterministic_kernels, isolated_rng, stream_seed
from bdfast.runtime.frozen import FrozenModel
from bdfast.runtime.guard import model_device
from bdfast.runtime.progress import Callback, Record, Stopwatch
from bdfast.runtime.ranks import ALONE
from bdfast.training import TrainConfig, train_classifier
from bdfast.training.parallel import training_forward
from bdfast.training.resume import fingerprint
from bdfast.training.workspace import Normalization

Factory = Callable[[], nn.Module]
FORMAT = "bdfast.advrbd/1"


@dataclass
class Run:
    """One run of :func:`bdfast.defenses.advrbd`."""

    factory: Factory
    images: Tensor  # [N, C, H, W]
    labels: Tensor  # [N] int64, on the CPU
    config: AdvrBDConfig
    normalize: Statistics | None
    is_poisoned: Tensor | None  # [N] bool, on the CPU
    callback: Callback | None
    folder: Path | None
    watch: Stopwatch
    num_classes: int = 0
    epochs: int = 0  # of all stages together
    history: list[Record] = field(default_factory=list)
    _last: nn.Module | None = None
    _content_scores: Tensor | None = None

    def fresh(self, stage: str) -> nn.Module:
        """A network from the factory, whose draws are those of the stage."""
        with isolated_rng(stream_seed(self.config.seed, f"advrbd: weights, {stage}")):
            model = self.factory()
        if not isinstance(model, nn.Module):
            got, remedy = type(model).__name__, "return an nn.Module"
            raise TypeError(message("advrbd", "model_factory", "a function that makes a network", got, remedy))
        if model is self._last:
            expected, got = "a new network from every call", "the same object twice"
            raise ValueError(message("advrbd", "model_factory", expected, got, "build it inside the function"))
        self._last = model
        for p in model.parameters():  # every stage trains all of it
            p.requires_grad_(p.is_floating_point())
        return model

    def train(self, stage: str, model: nn.Module, keep: Tensor, labels: Tensor | None = None, **options: Any) -> None:
        """Train ``model`` itself on some samples, with the labels given or others."""
        given = self.labels if labels is None else labels
        config = TrainConfig(
            **{"batch_size": self.config.batch_size, "momentum": self.config.momentum, **options},
            weight_decay=self.config.weight_decay, augment=self.config.augment, precision=self.config.precision,
            seed=stream_seed(self.config.seed, f"advrbd: {stage}") % 2**32, deterministic=self.config.deterministic,
        )  # fmt: skip
        before = len(self.history)
        erasing = isinstance(model, RandomErasing)
        with self.watch(stage.split(" ")[0]), warnings.catch_warnings():
            if erasing:
                warnings.filterwarnings("ignore", message="train_classifier: `data` expected samples of every class")
            result = train_classifier(
                model, (self.images[keep.to(self.images.device)], given[keep]), config,
                callback=lambda record: self._tell(self._named(stage, record, before)),
                normalize=None if erasing else self.normalize, checkpoint=self._file(stage),
            )  # fmt: skip
        self.history.extend(self._named(stage, record, before) for record in result.history)

    def kl(self, model: nn.Module, number: int) -> Tensor:
        """KL scores of round ``number``, NaN where they are not finite."""
        c = self.config
        options = KLScoreConfig(
            radius=c.radius, eps=c.eps, steps=c.steps, step_size=c.step_size, objective=c.attack, patches=c.patches,
            combine="median", precision=c.precision, batch_size=c.score_batch_size, round=number,
            seed=stream_seed(c.seed, "advrbd: patches") % 2**31,
        )  # fmt: skip
        folder = None if self.folder is None else self.folder / f"scores_{number}"
        with self.watch("partition"):
            table = kl_scores(model, (self.images, self.labels), options, normalize=self.normalize, checkpoint=folder)
        scores: Tensor = table.scores.cpu()
        return scores

    def logits(self, model: nn.Module) -> Tensor:
        """Logits of the whole set, float32 ``[N, K]`` on the CPU."""
        place = torch.empty(0, dtype=torch.float32, device=model_device(model))
        with FrozenModel(model, normalize=self.normalize, where="advrbd") as frozen:
            return torch.cat([frozen.logits(to_floats(part, place)).cpu() for part in self._parts()])

    def predictions(self, model: nn.Module) -> Tensor:
        """Arg-max of every sample's logits; -1 where they are not finite."""
        logits = self.logits(model)
        return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)

    def scores(self, model: nn.Module, number: int, content: Tensor | None) -> Tensor:
        """What round ``number`` ranks the samples by: large is presumed clean."""
        if self.config.rank == "kl":
            return self.kl(model, number)
        if self.config.rank == "content":
            assert content is not None
            if self._content_scores is None:  # of the warm-up model: enhancement changes what a network is sure of
                other = self.kl(model, 0) if self.config.content_with == "kl" else self.doubt(model)
                self._content_scores = weighed(content, other, self.labels, recognised(content))
            return self._content_scores
        if self.config.rank == "confidence":
            return self.doubt(model)
        truth = self.is_poisoned if self.config.rank == "oracle" else None
        return random_scores(len(self.labels), stream_seed(self.config.seed, f"advrbd: draw {number}"), truth)

    def doubt(self, model: nn.Module) -> Tensor:
        """How unsure the network is of each sample: minus the largest probability."""
        with self.watch("partition"):
            return -self.logits(model).softmax(1).amax(1)

    def content(self) -> Tensor:
        """Content margins of all samples, a network a group of classes; see :mod:`~bdfast.defenses.advrbd.content`."""
        margins = torch.full((len(self.labels),), float("nan"), dtype=torch.float32)
        for number, left_out in enumerate(dealt(self.num_classes, self.config.content_networks)):
            stage = f"content {number}"
            seen = ~torch.isin(self.labels, torch.tensor(left_out))
            if not bool(seen.any()):
                expected, remedy = "samples of several classes", "content needs other classes to compare with"
                raise ValueError(message("advrbd", "poisoned_data", expected, "of one alone", remedy))
            network: nn.Module = self.fresh(stage)
            network = RandomErasing(network if self.normalize is None else normalized(network, *self.normalize))
            network.to(model_device(network))
            self.train(stage, network, seen, epochs=self.config.content_epochs, lr=self.config.warm_up_lr)
            with self.watch("content"):
                own = content_margins(
                    self._view(network), self.labels, left_out,
                    seeds=self.config.content_seeds, shrinkage=self.config.content_shrinkage,
                    seeding=self.config.content_seeding,
                )  # fmt: skip
            margins = torch.where(~seen, own.cpu(), margins)
        return margins

    def enhance(self, model: nn.Module, in_dc: Tensor, number: int) -> None:
        """The ``number``-th enhancement, of ``model`` itself."""
        training = enhancement(self.config, number, self.num_classes)
        self._train_on_pairs(f"enhance {number}", model, ~in_dc, in_dc, training)

    def look(self, model: nn.Module, weights: dict[str, Tensor], suspected: Tensor, number: int) -> Tensor:
        """Log density ratios of the suspects, as each half of them looks to a network that knows the other; else NaN.

        ``model`` starts from ``weights`` both times; see :mod:`~bdfast.defenses.advrbd.contrast`.
        """
        ratios = torch.full((len(self.labels),), float("nan"), dtype=torch.float32)
        for number_of_half, half in enumerate(halves(suspected, self.config.seed, number)):
            stage = f"look {number}.{number_of_half}"
            model.load_state_dict(weights)
            self._train_on_pairs(stage, model, suspected & ~half, ~suspected, contrast(self.config, stage))
            with self.watch("look"):
                ratios = torch.where(half, own_logits(self.logits(model), self.labels), ratios)
        return ratios

    def _train_on_pairs(
        self, stage: str, model: nn.Module, suspected: Tensor, presumed: Tensor, training: PairTraining
    ) -> None:
        before = len(self.history)
        weight = next(p for p in model.parameters() if p.is_floating_point())
        plain = model if self.normalize is None else normalized(model, *self.normalize).to(weight.device)
        forward = training_forward(plain, ALONE, compiled=False)
        with (
            self.watch(stage.split(" ")[0]),
            isolated_rng(stream_seed(self.config.seed, f"advrbd: {stage}"), weight.device),
            deterministic_kernels(self.config.deterministic, weight.device),
            torch.enable_grad(),
        ):
            sides = two_sides(self.images, self.labels, suspected, presumed, weight.detach(), self.config)
            records = train_on_pairs(
                model, forward, sides, training, self.config, checkpoint=self._file(stage),
                finished=lambda record: self._tell(self._named(stage, record, before)),
            )  # fmt: skip
        self.history.extend(self._named(stage, record, before) for record in records)

    @torch.no_grad()
    def _view(self, network: nn.Module) -> ContentView:
        _, layer = classifier_layers(network, "advrbd")[-1]
        place = next(p for p in network.parameters() if p.is_floating_point()).detach().flatten()[:0]
        features, logits = [], []
        network.eval()
        with LastLayer(network, layer, "advrbd") as last:
            for part in self._parts():
                hidden, output = last(to_floats(part, place))
                features.append(hidden.flatten(1).float())
                logits.append(output.float())
        return ContentView(torch.cat(features), torch.cat(logits))

    def _parts(self) -> Iterator[Tensor]:
        size = self.config.score_batch_size
        return (self.images[start : start + size] for start in range(0, len(self.images), size))

    def _named(self, stage: str, record: Record, before: int) -> Record:
        """A record of one stage among those of all, epochs counted through."""
        return {"stage": stage, **record, "epoch": before + record["epoch"], "epochs": self.epochs}

    def _tell(self, record: Record) -> None:
        if self.callback is not None:
            self.callback(record)

    def _file(self, stage: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{stage.replace(' ', '_')}.pt"


@contextmanager
def open_run(
    factory: Factory,
    data: object,
    config: AdvrBDConfig,
    normalize: Normalization | None,
    ground_truth: Tensor | None,
    callback: Callback | None,
    checkpoint: str | os.PathLike[str] | None,
) -> Iterator[tuple[Run, nn.Module]]:
    """Check everything before any work; yields the run and the network to warm up."""
    if not callable(factory) or isinstance(factory, nn.Module):
        got, remedy = type(factory).__name__, "pass lambda: build(...); several networks are needed"
        raise TypeError(message("advrbd", "model_factory", "a function that makes a network", got, remedy))
    images, labels = as_tensors(data, "advrbd", "poisoned_data")
    labels = labels.cpu()
    truth = known_truth("advrbd", ground_truth, data, len(labels))
    if config.rank == "oracle" and truth is None:
        got, remedy = "no ground truth", "pass ground_truth=..., or another rank: a defender does not have it"
        raise ValueError(message("advrbd", "ground_truth", 'bool [N] for rank="oracle"', got, remedy))
    scale = statistics("advrbd", normalize)
    run = Run(factory, images, labels, config, scale, truth, callback, None, Stopwatch(torch.device("cpu")))
    with isolated_rng(stream_seed(config.seed, "global")), torch.inference_mode(False):
        model = run.fresh("warm_up")
        run.watch = Stopwatch(model_device(model))
        with run.watch("setup"):
            probe = to_floats(images[:2], torch.empty(0, dtype=torch.float32, device=model_device(model)))
            with FrozenModel(model, normalize=run.normalize, where="advrbd") as frozen:
                run.num_classes = frozen.logits(probe).shape[1]
            check_labels(labels, run.num_classes, "advrbd", "poisoned_data: labels")
            if checkpoint is not None:
                run.folder = _open_folder(Path(checkpoint), run)
        yield run, model


def _open_folder(folder: Path, run: Run) -> Path:
    """The folder of this very run, made or found."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(message("advrbd", "checkpoint", "a folder", f"{folder}, a file", "choose another path"))
    folder.mkdir(parents=True, exist_ok=True)
    own = fingerprint("advrbd", _Identity(asdict(run.config), repr(run.normalize)), (run.images, run.labels))
    note = folder / "run.txt"
    text = f"{FORMAT} {own}\n"
    if note.exists():
        if note.stat().st_size > 1024 or note.read_text(encoding="utf-8", errors="replace") != text:
            got, remedy = "one of another config or data", "take another path, or remove it to start afresh"
            raise ValueError(message("advrbd", f"checkpoint: {folder}", "a checkpoint of this very run", got, remedy))
    elif any(folder.iterdir()):
        got, remedy = "a folder with other things in it", "take another path"
        raise ValueError(message("advrbd", f"checkpoint: {folder}", "an empty folder", got, remedy))
    else:
        with atomic_write(note) as file:
            file.write(text)
    return folder


@dataclass(frozen=True)
class _Identity:
    config: dict[str, Any]
    normalize: str
