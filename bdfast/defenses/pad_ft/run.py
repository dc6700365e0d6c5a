"""What PAD-FT works with: a copy of the victim, the training set in parts, the selected samples on the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bdfast.data.source import Source, to_floats
from bdfast.defenses.ground_truth import known_truth
from bdfast.defenses.last_layer import LastLayer
from bdfast.defenses.pad_ft.bounds import Suspects, frozen_copy, observe, starting_bounds
from bdfast.defenses.pad_ft.config import PadFTConfig
from bdfast.defenses.pad_ft.scores import Caller, Scores, score
from bdfast.errors import message
from bdfast.models.classifier import classifier_heads, classifier_layers
from bdfast.nn import clip_activations
from bdfast.nn.clip_activations import ClippedModel
from bdfast.nn.clipped_relu import weight_beside_bounds
from bdfast.nn.normalize import normalized, statistics
from bdfast.runtime.determinism import deterministic_kernels, isolated_rng, stream_seed
from bdfast.runtime.guard import model_device, usable_device, working_model
from bdfast.runtime.hooks import quiet_hooks
from bdfast.runtime.outputs import first_pass, logits_of
from bdfast.runtime.precision import in_precision
from bdfast.runtime.progress import Stopwatch
from bdfast.runtime.ranks import ALONE, Ranks
from bdfast.runtime.resident import ResidentData
from bdfast.training.resume import fingerprint
from bdfast.training.workspace import Normalization, check_weights


class Clipped(NamedTuple):
    """The network with its bounds, and what they are trained on."""

    forward: nn.Module
    fast: nn.Module  # the same function of images and bounds, for step 2 alone: see frozen_copy
    bounds: dict[str, nn.Parameter]  # by site
    kept: ResidentData  # samples that it got right without bounds; all, if it got none right
    logits: Tensor  # [N, K] of those, without bounds
    any_right: bool


@dataclass
class Run:
    """One run of :func:`bdfast.defenses.pad_ft`."""

    caller: Caller
    work: nn.Module  # a copy of the victim, in eval mode; from step 2 on with its bounds
    source: Source
    num_classes: int
    layer_name: str  # of the last linear layer
    normalize: Normalization | None
    place: Tensor  # of the device and dtype that the model wants
    is_poisoned: Tensor | None  # [N] bool, on the CPU
    watch: Stopwatch

    @property
    def layer(self) -> nn.Linear:
        """The last linear layer."""
        layer = self.work.get_submodule(self.layer_name)
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def forward(self) -> nn.Module:
        """The network, from images in [0, 1]."""
        return self.work if self.normalize is None else normalized(self.work, *self.normalize).to(self.place.device)

    def score(
        self,
        config: PadFTConfig,
        folder: str | os.PathLike[str] | None,
        *,
        ranks: Ranks = ALONE,
        finished: Callable[[int], object] | None = None,
    ) -> Scores:
        """Step 1: margins of all samples, and their features where they are asked for."""
        dims = config.split_dims if config.split == "spread" else 0
        with LastLayer(self.forward, self.layer, self.caller.where) as features:
            return score(
                self.caller, features, self.source, num_classes=self.num_classes, place=self.place,
                batch_size=config.score_batch_size, dims=dims, seed=stream_seed(config.seed, "pad_ft: sketch"),
                run="" if folder is None else self._fingerprint(config, dims), folder=folder,
                ranks=ranks, finished=finished,
            )  # fmt: skip

    def _fingerprint(self, config: PadFTConfig, dims: int) -> str:
        """What the scores depend on; of the data, its size and both ends."""
        options = _ScoreRun(len(self.source), config.score_batch_size, dims, config.seed, self.normalize)
        ends = self.source.read(torch.tensor([0, len(self.source) - 1]))
        return fingerprint("pad_ft: scores", options, (*self.work.state_dict().values(), *ends))

    def gather(self, indices: Tensor) -> ResidentData:
        """Samples on the device, as they are."""
        return ResidentData(*self.source.read(indices), device=self.place.device, dtype=self.place.dtype)

    def suspects(self, indices: Tensor, labels: Tensor, config: PadFTConfig) -> Suspects | None:
        """At most k suspects of a class, drawn by the seed, or None where they do not count."""
        if len(indices) == 0 or config.suspect_weight == 0:
            return None
        generator = torch.Generator().manual_seed(stream_seed(config.seed, "pad_ft: suspects"))
        order = indices[torch.randperm(len(indices), generator=generator)]
        chosen = torch.cat([order[labels[order] == c][: config.k] for c in torch.unique(labels[indices]).tolist()])
        images, given = self.source.read(chosen)
        return Suspects(to_floats(images, self.place), given.to(self.place.device))

    def clip(self, trusted: ResidentData, config: PadFTConfig) -> Clipped:
        """Put bounds into the network, as high as ``config.init`` says."""
        images, _ = self.source.read(range(min(2, len(self.source))))
        example = to_floats(images, self.place)
        self.work = clipped = clip_activations(self.work, config.sites, example=example)
        for p in clipped.parameters():
            p.requires_grad_(False)
        forward = in_precision(self.forward.eval(), config.precision)
        observed, logits = observe(forward, clipped.sites, trusted, config.score_batch_size)
        bounds = clipped.bounds
        for name, start in starting_bounds(observed, config.init).items():
            bounds[name].data.copy_(start)
            bounds[name].requires_grad_(True)
        fast = in_precision(frozen_copy(self.forward, bounds, example), config.precision)
        right = logits.argmax(1) == trusted.labels
        any_right = bool(right.any())
        if any_right:
            trusted = ResidentData(
                trusted.images[right], trusted.labels[right], device=trusted.device, dtype=self.place.dtype
            )
            logits = logits[right]
        return Clipped(forward, fast, bounds, trusted, logits, any_right)


@contextmanager
def open_run(
    caller: Caller,
    model: nn.Module,
    data: object,
    config: PadFTConfig,
    normalize: Normalization | None,
    device: str | torch.device | None,
    ground_truth: Tensor | None,
) -> Iterator[Run]:
    """Check everything before any work; on leaving, the caller's world is as before."""
    where = caller.where
    if not isinstance(model, nn.Module):
        raise TypeError(message(where, "model", "a torch.nn.Module", type(model).__name__, "wrap it in a Module"))
    normalize = statistics(where, normalize)
    place = None if device is None else usable_device(where, device)
    actual = place or model_device(model)
    watch = Stopwatch(actual)
    with (
        isolated_rng(stream_seed(config.seed, "global"), actual),
        deterministic_kernels(config.deterministic, actual),
        working_model(model, where, device=place) as work,
    ):
        with watch("setup"):
            check_weights(where, work)
            source = Source(where, data, caller.data)
            is_poisoned = known_truth(where, ground_truth, data, len(source))
            weight = weight_beside_bounds(work)
            assert weight is not None  # check_weights has seen to it
            name, _ = classifier_layers(work.eval(), where)[-1]
            run = Run(caller, work, source, 0, name, normalize, weight.detach().flatten()[:0], is_poisoned, watch)
            run.num_classes = _probe(run).shape[1]
            rest = quiet_hooks(work, lambda: _probe(run))
        with rest:
            yield run
        if isinstance(run.work, ClippedModel):
            run.work.training = model.training
            for site in run.work.sites.values():
                site.training, site.bound.grad = model.training, None


@dataclass(frozen=True)
class _ScoreRun:
    samples: int
    batch_size: int
    dims: int
    seed: int
    normalize: Normalization | None


@torch.no_grad()
def _probe(run: Run) -> Tensor:
    """Logits of the first two samples, which have to be what the last linear layer puts out."""
    where = run.caller.where
    images, _ = run.source.read(range(min(2, len(run.source))))
    with LastLayer(run.forward, run.layer, where) as features:
        x = to_floats(images, run.place)
        with first_pass(where, x):
            hidden, output = features(x)
    logits = logits_of(where, output, len(images))
    if hidden.ndim != 2 or not torch.allclose(run.layer(hidden), logits, rtol=1e-3, equal_nan=True):
        expected = "logits that come straight from its last linear layer"
        got, remedy = f"something else behind `{run.layer_name}`", "return the logits themselves"
        if len(beside := [f"`{name}`" for name, _ in classifier_heads(run.work, where)]) > 1:
            got = f"what {' and '.join(beside)} put out together"
            remedy = "take d3, which moves every head, or a copy of the model that returns the logits of one"
        raise ValueError(message(where, "model", expected, got, remedy))
    return logits
