"""A model on test images, clean and triggered: one pass over each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bdfast.errors import message
from bdfast.metrics.checks import classes_of, describe, labels_of, rate_of
from bdfast.metrics.ratings import Metrics
from bdfast.nn.clipped_relu import weight_beside_bounds
from bdfast.nn.normalize import statistics
from bdfast.runtime.outputs import first_pass


class Predictions(NamedTuple):
    """What a model makes of a set of images, on the CPU."""

    classes: Tensor  # [N] int64, -1 where the logits are not all finite
    finite: Tensor  # [N] bool


def evaluate(
    model: nn.Module,
    clean: tuple[Tensor, Tensor],  # images [N, C, H, W], labels [N]
    triggered: tuple[Tensor, ...],  # images [M, C, H, W], attack labels [M], original labels [M], eligible [M]
    *,
    batch_size: int = 512,
    device: torch.device | str | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Metrics:
    """ACC on clean images, ASR and RA on triggered ones, in one pass over each.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits [B, K], or to an output with ``.logits``.
        clean: ``(images, labels)``, images uint8 or float in [0, 1].
        triggered: ``(images, attack_labels, original_labels, eligible)``, as ``PoisonedData.trigger`` returns. Without
            ``eligible``, rows count whose true class is not the attack label.
        batch_size: images a forward pass.
        device: where to run. None: the model's.
        normalize: ``(mean, std)``, one number a channel, unless the model normalises itself.

    Returns:
        :class:`Metrics`. Training flags, gradients and random state of the model are as before.

    Warns:
        UserWarning: pixels outside [0, 1], which most models are not trained on.

    Raises:
        TypeError, ValueError: arguments of another kind or shape than stated.

    Example:
        >>> from bdfast import attacks
        >>> images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 4
        >>> triggered = attacks.poison(images, labels, "badnets", rate=0.1).trigger(images, labels)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        >>> metrics = evaluate(model, (images, labels), triggered)
        >>> metrics.n_clean, metrics.n_triggered, metrics.n_eligible
        (40, 40, 30)
    """
    if not isinstance(clean, (tuple, list)) or len(clean) != 2:
        expected, remedy = "a tuple (images, labels)", "pass two tensors"
        raise TypeError(message("evaluate", "clean", expected, describe(clean), remedy))
    if not isinstance(triggered, (tuple, list)) or len(triggered) not in (3, 4):
        expected, remedy = "a tuple (images, attack_labels, original_labels[, eligible])", "pass poisoned.trigger(...)"
        raise TypeError(message("evaluate", "triggered", expected, describe(triggered), remedy))
    for argument, images in (("clean[0]", clean[0]), ("triggered[0]", triggered[0])):
        _check_predict("evaluate", argument, model, images, batch_size, normalize)
    true = labels_of("evaluate", "clean[1]", clean[1], clean[0]).cpu()
    wanted, original = (labels_of("evaluate", f"triggered[{i}]", triggered[i], triggered[0]).cpu() for i in (1, 2))
    eligible = original != wanted
    if len(triggered) == 4:
        eligible = _eligible(triggered[3], eligible)

    on_clean, on_triggered = (
        _predict("evaluate", model, images, batch_size, device, normalize) for images in (clean[0], triggered[0])
    )
    everything, others = torch.ones_like(eligible), (original != wanted) & ~eligible
    counted = torch.ones_like(true, dtype=torch.bool)
    if len(wanted) > 0 and bool((wanted == wanted[0]).all()):
        counted = true != wanted[0]
    return Metrics(
        acc=rate_of("evaluate (acc)", on_clean.classes == true, torch.ones_like(counted)),
        asr=rate_of("evaluate (asr)", on_triggered.classes == wanted, eligible),
        ra=rate_of("evaluate (ra)", on_triggered.classes == original, eligible),
        asr_with_target=rate_of("evaluate (asr_with_target)", on_triggered.classes == wanted, everything),
        asr_others=rate_of("evaluate (asr_others)", on_triggered.classes == wanted, others)
        if others.any()
        else math.nan,
        acc_without_target=rate_of("evaluate (acc_without_target)", on_clean.classes == true, counted),
        n_clean=len(true),
        n_triggered=len(wanted),
        n_eligible=int(eligible.sum()),
        n_nonfinite=int((~on_clean.finite).sum() + (~on_triggered.finite).sum()),
    )


def predict(
    model: nn.Module,
    images: Tensor,  # [N, C, H, W] uint8, or float in [0, 1]
    *,
    batch_size: int = 512,
    device: torch.device | str | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Predictions:
    """Classify images in their order, in eval mode, without gradients.

    The host does not wait for the device between batches: the results come back once, at the end.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits [B, K], or to an output with ``.logits``.
        images: [N, C, H, W], uint8 or float in [0, 1].
        batch_size: images a forward pass.
        device: where to run. None: the model's.
        normalize: ``(mean, std)``, one number a channel, unless the model normalises itself.

    Returns:
        :class:`Predictions`: classes [N] int64 and finite [N] bool, on the CPU.

    Warns:
        UserWarning: pixels outside [0, 1].

    Raises:
        TypeError, ValueError: arguments, or a model output, of another kind or shape than stated.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.zeros_(model[1].weight)
        >>> predict(model, torch.rand(3, 1, 2, 2))
        Predictions(classes=tensor([0, 0, 0]), finite=tensor([True, True, True]))
    """
    _check_predict("predict", "images", model, images, batch_size, normalize)
    return _predict("predict", model, images, batch_size, device, normalize)


def _predict(
    where: str,
    model: nn.Module,
    images: Tensor,
    batch_size: int,
    device: torch.device | str | None,
    normalize: tuple[Sequence[float], Sequence[float]] | None,
) -> Predictions:
    found = weight_beside_bounds(model)
    weight: Tensor = torch.empty(0, dtype=torch.float32, device=images.device) if found is None else found
    device = torch.device(weight.device if device is None else device)
    scale = None
    if (parts := statistics(where, normalize)) is not None:
        scale = [torch.tensor(part, dtype=torch.float32, device=device)[:, None, None] for part in parts]
    classes = torch.empty(len(images), dtype=torch.int64, device=device)
    with _eval_mode(model), torch.no_grad():
        for start in range(0, len(images), batch_size):
            # Never non-blocking towards the host: the forward pass would read a copy that is still under way.
            batch = images[start : start + batch_size].to(device, non_blocking=device.type != "cpu")
            x = batch.to(torch.float32) / 255 if batch.dtype == torch.uint8 else batch
            if scale is not None:
                x = (x - scale[0]) / scale[1]
            with first_pass(where, x):
                output = model(x.to(weight.dtype))
            logits = getattr(output, "logits", output)
            _check_logits(where, logits, len(batch))
            classes[start : start + batch_size] = classes_of(where, logits)
    classes = classes.cpu()
    return Predictions(classes, classes >= 0)


def _check_predict(
    where: str,
    argument: str,
    model: nn.Module,
    images: Tensor,
    batch_size: int,
    normalize: tuple[Sequence[float], Sequence[float]] | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(message(where, "model", "a torch.nn.Module", describe(model), "wrap it in a Module"))
    expected = "a tensor [N, C, H, W], uint8 or float in [0, 1]"
    if not isinstance(images, Tensor) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise TypeError(message(where, argument, expected, describe(images), "convert to uint8 or float"))
    if images.ndim != 4:
        raise ValueError(message(where, argument, expected, describe(images), "pass a batch, channels first"))
    if images.numel() and images.is_floating_point():
        low, high = (float(bound) for bound in images.detach().aminmax())
        if low < 0 or high > 1:  # no error: what a model wants is the model's affair; a NaN is, too
            remedy = "divide 0..255 by 255; normalised ones: undo it, and pass normalize=(mean, std)"
            text = message(where, argument, expected, f"values from {low:.8g} to {high:.8g}", remedy)
            warnings.warn(text, UserWarning, stacklevel=3)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(message(where, "batch_size", "a positive integer", repr(batch_size), "pass e.g. 512"))
    scale = statistics(where, normalize)
    if scale is not None:
        lengths = [len(part) for part in scale]
        if any(length not in (1, images.shape[1]) for length in lengths):
            expected = f"(mean, std) of 1 or {images.shape[1]} numbers each"
            raise ValueError(message(where, "normalize", expected, f"lengths {lengths}", "one number a channel"))


def _check_logits(where: str, logits: object, count: int) -> None:
    expected = f"an output of logits [{count}, K], or one with .logits"
    if not isinstance(logits, Tensor):
        raise TypeError(message(where, "model", expected, describe(logits), "return the logits"))
    if logits.ndim != 2 or len(logits) != count or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(message(where, "model", expected, describe(logits), "return the logits"))


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and each module's own flag again outside: a frozen BN in a training model stays frozen."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _eligible(eligible: Tensor, like: Tensor) -> Tensor:
    if not isinstance(eligible, Tensor) or eligible.dtype != torch.bool or eligible.shape != like.shape:
        expected = f"a bool tensor {list(like.shape)}"
        raise TypeError(message("evaluate", "triggered[3]", expected, describe(eligible), "pass a mask of rows"))
    return eligible.to(like.device)
