"""Where training happens: the model to train, the data on its device, and everything put back afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bdfast.data import as_tensors, check_labels
from bdfast.errors import message
from bdfast.nn.clipped_relu import weight_beside_bounds
from bdfast.nn.normalize import normalized, statistics
from bdfast.runtime.determinism import deterministic_kernels, isolated_rng, stream_seed
from bdfast.runtime.guard import model_device, usable_device, working_model
from bdfast.runtime.hooks import quiet_hooks
from bdfast.runtime.outputs import first_pass, logits_of
from bdfast.runtime.progress import Stopwatch
from bdfast.runtime.ranks import ALONE, Ranks
from bdfast.runtime.resident import Augment, ResidentData
from bdfast.training.options import augmentation
from bdfast.training.parallel import check_same, training_forward

Normalization: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""(mean, std), one number a channel, of a model that does not normalise its own input."""


@dataclass(frozen=True)
class Workspace:
    """What a training loop needs.

    Attributes:
        model: the network to train, all of its floating-point parameters trainable.
        forward: images in [0, 1] to the output of ``model``.
        data: the samples, on the device of ``model``.
        num_classes: K, as the model's logits tell.
        watch: takes the time of stages; set-up is in it already.
        ranks: the processes that train together; this one alone by default.
    """

    model: nn.Module
    forward: nn.Module
    data: ResidentData
    num_classes: int
    watch: Stopwatch
    ranks: Ranks = ALONE


@contextmanager
def workspace(
    where: str,
    model: nn.Module,
    data: object,
    options: Any,
    *,
    argument: str = "data",
    normalize: Normalization | None = None,
    device: str | torch.device | None = None,
    inplace: bool = False,
    channels_last: bool | None = None,
    compiled: bool = False,
    quiet: bool = True,
    ranks: Ranks = ALONE,
) -> Iterator[Workspace]:
    """Check model and data, then open a :class:`Workspace`; on leaving, the caller's world is as before.

    Args:
        where: the function on whose behalf this happens; it opens the messages.
        model: from NCHW float images to logits, or to an output with ``.logits``.
        data: anything that :func:`bdfast.data.as_tensors` takes.
        options: a config with ``augment``, ``seed``, ``precision`` and ``deterministic``.
        argument: the name of ``data`` in ``where``.
        normalize: (mean, std) of a model that does not normalise its own input.
        device: where to work; None is where the model is.
        inplace: train ``model`` itself.
        channels_last: memory format of model and batches; None: channels_last on a GPU in bfloat16.
        compiled: run the training step's forward and backward through ``torch.compile``.
        quiet: hooks that only watch rest (:mod:`bdfast.runtime.hooks`).
        ranks: processes that train ``model`` together, on the same data, which all of them hold; when the block ends,
            all have the weights and the buffers of rank 0.

    Raises:
        TypeError, ValueError: model or data of another kind than stated, weights that are not finite.
        LabelRangeError: a label that is no class of the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(message(where, "model", "a torch.nn.Module", type(model).__name__, "wrap it in a Module"))
    scale = statistics(where, normalize)
    place = None if device is None else usable_device(where, device)
    actual = place or model_device(model)
    watch = Stopwatch(actual)
    if channels_last is None:
        channels_last = actual.type == "cuda" and options.precision == "bf16"
    with (
        isolated_rng(stream_seed(options.seed, f"global {ranks.rank}" if ranks.rank else "global"), actual),
        deterministic_kernels(options.deterministic, actual),
        working_model(model, where, inplace=inplace, device=place) as work,
    ):
        with watch("setup"):
            check_weights(where, work)
            images, labels = as_tensors(data, where, argument)
            resident = _resident(work, images, labels, options.augment, channels_last)
            plain: nn.Module = work if scale is None else normalized(work, *scale).to(resident.device)
            num_classes = _probe(where, plain, resident).shape[1]
            check_labels(labels, num_classes, where, f"{argument}: labels")
            _warn_of_empty_classes(where, argument, labels, num_classes)
            for p in work.parameters():
                p.requires_grad_(p.is_floating_point())
            if channels_last:
                work.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            check_same(where, argument, options, resident.images, resident.labels, ranks)
            rest = quiet_hooks(work, lambda: _probe(where, plain, resident)) if quiet else nullcontext()
        with rest:
            with watch("setup"):  # without the hooks that rest
                same = partial(_same_logits, where, plain, resident)
                forward = training_forward(plain, ranks, compiled, same)
            yield Workspace(work, forward, resident, num_classes, watch, ranks)
        ranks.copy_(work.buffers())


@torch.no_grad()
def check_weights(where: str, model: nn.Module) -> None:
    """The model has parameters to train, and they and its buffers are finite."""
    named = [(name, p) for name, p in model.state_dict(keep_vars=True).items() if isinstance(p, Tensor)]
    if weight_beside_bounds(model) is None:
        raise ValueError(message(where, "model", "parameters to train", "none", "pass a network"))
    bad = next((name for name, p in named if p.is_floating_point() and not bool(p.isfinite().all())), None)
    if bad is not None:
        remedy = "load or train the model again"
        raise ValueError(message(where, "model", "finite weights", f"NaN or infinity in `{bad}`", remedy))


def _resident(model: nn.Module, images: Tensor, labels: Tensor, augment: Any, channels_last: bool) -> ResidentData:
    weight = weight_beside_bounds(model)
    assert weight is not None  # check_weights has seen to it
    chosen: Augment = augmentation(augment, images.shape)
    return ResidentData(
        images, labels, device=weight.device, augment=chosen, dtype=weight.dtype, channels_last=channels_last
    )


@torch.no_grad()
def _probe(where: str, forward: nn.Module, data: ResidentData) -> Tensor:
    """Logits of the first two samples, in eval mode."""
    modes = [(module, module.training) for module in forward.modules()]
    try:
        x, _, _ = next(data.batches(2, shuffle=False, epoch_seed=0))
        with first_pass(where, x):
            output = forward.eval()(x)
        return logits_of(where, output, len(x))
    finally:
        for module, training in modes:
            module.training = training


def _same_logits(where: str, model: nn.Module, data: ResidentData, other: nn.Module) -> bool:
    """Whether another forward gives the logits of ``model``, bit for bit."""
    logits, others = _probe(where, model, data), _probe(where, other, data)
    return torch.equal(logits.nan_to_num(), others.nan_to_num())


def _warn_of_empty_classes(where: str, argument: str, labels: Tensor, num_classes: int) -> None:
    counts = torch.bincount(labels.cpu(), minlength=num_classes)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        text = message(
            where, argument, "samples of every class", f"none of class {empty[:10]}", "expect it to be forgotten"
        )
        warnings.warn(text, UserWarning, stacklevel=5)
