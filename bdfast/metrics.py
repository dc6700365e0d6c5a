"""What a defence is judged by. Every rate is a fraction in [0, 1], never a percentage.

* ACC: accuracy on clean test images.
* ASR: fraction of triggered test images classified as the attack label, among those of another true class.
* RA: fraction of the same images classified as their true class, hence ASR + RA <= 1.
* DER = (max(0, ASR0 - ASR1) - max(0, ACC0 - ACC1) + 1) / 2, from before (0) to after (1) a defence (D3, Eq. 5).
* RIR = (max(0, RA1 - RA0) - max(0, ACC0 - ACC1) + 1) / 2, the same for RA.

A row of logits that holds a NaN or an infinity is classified as -1, so that it counts as wrong everywhere; equal logits
go to the lowest class. Where nothing counts, a rate is NaN and a warning says so.
"""

from __future__ import annotations

import json
import math
import numbers
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from bdfast.errors import message
from bdfast.nn.normalize import statistics
from bdfast.runtime.outputs import first_pass

__all__ = [
    "Metrics",
    "Predictions",
    "accuracy",
    "attack_success_rate",
    "defense_effectiveness_rating",
    "evaluate",
    "predict",
    "robust_accuracy",
    "robust_improvement_rating",
]


@dataclass(frozen=True)
class Metrics:
    """A model's rates (fractions in [0, 1], NaN where nothing counts) and the numbers of images behind them."""

    acc: float  # clean test images
    asr: float  # triggered images of another true class than the attack label
    ra: float = math.nan  # the same images against their true labels
    asr_with_target: float = math.nan  # all triggered images
    acc_without_target: float = math.nan  # clean images of other classes than the single attack label, if it is single
    n_clean: int = 0
    n_triggered: int = 0
    n_eligible: int = 0  # triggered images behind asr and ra
    n_nonfinite: int = 0  # clean and triggered images with a NaN or an infinity among their logits: counted as wrong

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name."""
        return asdict(self)

    def to_json(self) -> str:
        """One JSON object; NaN becomes null.

        Example:
            >>> Metrics(acc=0.5, asr=1.0).to_json()[:38]
            '{"acc": 0.5, "asr": 1.0, "ra": null, "'
        """
        values = {name: None if math.isnan(value) else value for name, value in self.to_dict().items()}
        return json.dumps(values, allow_nan=False)


class Predictions(NamedTuple):
    """What a model makes of a set of images, on the CPU."""

    classes: Tensor  # [N] int64, -1 where the logits are not all finite
    finite: Tensor  # [N] bool


def accuracy(
    predictions: Tensor,  # [N] integer, or logits [N, C]
    labels: Tensor,  # [N] integer
) -> float:
    """Fraction of predictions that equal their label.

    Args:
        predictions: [N] classes, or [N, C] floating-point logits.
        labels: [N] true classes.

    Returns:
        A fraction in [0, 1]; NaN, with a warning, for an empty set.

    Raises:
        TypeError, ValueError: tensors of another kind or shape than stated.

    Example:
        >>> accuracy(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 3]))
        0.75
    """
    classes = _classes("accuracy", predictions)
    labels = _labels("accuracy", "labels", labels, classes)
    return _rate("accuracy", classes == labels, torch.ones_like(classes, dtype=torch.bool))


def attack_success_rate(
    predictions: Tensor,  # [N] integer, or logits [N, C]
    attack_labels: Tensor,  # [N] integer
    original_labels: Tensor,  # [N] integer
    *,
    include_target: bool = False,
) -> float:
    """Fraction of triggered images classified as the attacker wants.

    Args:
        predictions: [N] classes, or [N, C] floating-point logits, of triggered images.
        attack_labels: [N] what the attacker wants.
        original_labels: [N] true classes.
        include_target: count images whose true class is the attack label already, too.

    Returns:
        A fraction in [0, 1]; NaN, with a warning, where no image counts.

    Raises:
        TypeError, ValueError: tensors of another kind or shape than stated.

    Example:
        >>> predictions, wanted, true = torch.tensor([0, 0, 2]), torch.zeros(3, dtype=torch.long), torch.arange(3)
        >>> attack_success_rate(predictions, wanted, true)  # the first image is of the target class
        0.5
    """
    where = "attack_success_rate"
    classes = _classes(where, predictions)
    wanted = _labels(where, "attack_labels", attack_labels, classes)
    true = _labels(where, "original_labels", original_labels, classes)
    return _rate(
        where, classes == wanted, torch.ones_like(true, dtype=torch.bool) if include_target else true != wanted
    )


def robust_accuracy(
    predictions: Tensor,  # [N] integer, or logits [N, C]
    attack_labels: Tensor,  # [N] integer
    original_labels: Tensor,  # [N] integer
) -> float:
    """Fraction of triggered images classified as their true class, over those that count for ASR.

    Args:
        predictions: [N] classes, or [N, C] floating-point logits, of triggered images.
        attack_labels: [N] what the attacker wants; images whose true class it is do not count.
        original_labels: [N] true classes.

    Returns:
        A fraction in [0, 1]; NaN, with a warning, where no image counts.

    Raises:
        TypeError, ValueError: tensors of another kind or shape than stated.

    Example:
        >>> predictions, wanted, true = torch.tensor([0, 0, 2]), torch.zeros(3, dtype=torch.long), torch.arange(3)
        >>> robust_accuracy(predictions, wanted, true)
        0.5
    """
    classes = _classes("robust_accuracy", predictions)
    wanted = _labels("robust_accuracy", "attack_labels", attack_labels, classes)
    true = _labels("robust_accuracy", "original_labels", original_labels, classes)
    return _rate("robust_accuracy", classes == true, true != wanted)


@overload
def defense_effectiveness_rating(before: Metrics, after: Metrics, /) -> float: ...
@overload
def defense_effectiveness_rating(acc0: float, asr0: float, acc1: float, asr1: float) -> float: ...
def defense_effectiveness_rating(  # type: ignore[misc]
    acc0: Metrics | float,
    asr0: Metrics | float,
    acc1: float | None = None,
    asr1: float | None = None,
) -> float:
    """DER = (max(0, ASR0 - ASR1) - max(0, ACC0 - ACC1) + 1) / 2 (D3, Eq. 5).

    Takes the :class:`Metrics` before and after a defence, or the four fractions. 1 is a perfect defence, 0.5 one that
    changes nothing, 0 one that only destroys. BackdoorBench's helper adds the ACC term; the paper subtracts it.

    Returns:
        A number in [0, 1]; NaN if a rate is NaN.

    Raises:
        TypeError, ValueError: arguments that are neither, or a rate outside [0, 1], such as a percentage.

    Example:
        >>> defense_effectiveness_rating(acc0=0.9, asr0=1.0, acc1=0.8, asr1=0.0)
        0.95
    """
    where = "defense_effectiveness_rating"
    if isinstance(acc0, Metrics) and isinstance(asr0, Metrics):
        before, after = acc0, asr0
        return _rating(where, before.acc, after.acc, after.asr, before.asr)
    return _rating(where, acc0, acc1, asr1, asr0)


@overload
def robust_improvement_rating(before: Metrics, after: Metrics, /) -> float: ...
@overload
def robust_improvement_rating(acc0: float, ra0: float, acc1: float, ra1: float) -> float: ...
def robust_improvement_rating(  # type: ignore[misc]
    acc0: Metrics | float,
    ra0: Metrics | float,
    acc1: float | None = None,
    ra1: float | None = None,
) -> float:
    """RIR = (max(0, RA1 - RA0) - max(0, ACC0 - ACC1) + 1) / 2: DER for the robust accuracy.

    Takes the :class:`Metrics` before and after a defence, or the four fractions.

    Returns:
        A number in [0, 1]; NaN if a rate is NaN.

    Raises:
        TypeError, ValueError: arguments that are neither, or a rate outside [0, 1], such as a percentage.

    Example:
        >>> robust_improvement_rating(acc0=0.9, ra0=0.0, acc1=0.9, ra1=0.8)
        0.9
    """
    where = "robust_improvement_rating"
    if isinstance(acc0, Metrics) and isinstance(ra0, Metrics):
        before, after = acc0, ra0
        return _rating(where, before.acc, after.acc, before.ra, after.ra)
    return _rating(where, acc0, acc1, ra0, ra1)


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
        raise TypeError(message("evaluate", "clean", expected, _describe(clean), remedy))
    if not isinstance(triggered, (tuple, list)) or len(triggered) not in (3, 4):
        expected, remedy = "a tuple (images, attack_labels, original_labels[, eligible])", "pass poisoned.trigger(...)"
        raise TypeError(message("evaluate", "triggered", expected, _describe(triggered), remedy))
    for images in (clean[0], triggered[0]):
        _check_predict("evaluate", model, images, batch_size, normalize)
    true = _labels("evaluate", "clean[1]", clean[1], clean[0]).cpu()
    wanted, original = (_labels("evaluate", f"triggered[{i}]", triggered[i], triggered[0]).cpu() for i in (1, 2))
    eligible = original != wanted
    if len(triggered) == 4:
        eligible = _eligible(triggered[3], eligible)

    on_clean = predict(model, clean[0], batch_size=batch_size, device=device, normalize=normalize)
    on_triggered = predict(model, triggered[0], batch_size=batch_size, device=device, normalize=normalize)
    everything = torch.ones_like(eligible)
    counted = torch.ones_like(true, dtype=torch.bool)
    if len(wanted) > 0 and bool((wanted == wanted[0]).all()):
        counted = true != wanted[0]
    return Metrics(
        acc=_rate("evaluate (acc)", on_clean.classes == true, torch.ones_like(counted)),
        asr=_rate("evaluate (asr)", on_triggered.classes == wanted, eligible),
        ra=_rate("evaluate (ra)", on_triggered.classes == original, eligible),
        asr_with_target=_rate("evaluate (asr_with_target)", on_triggered.classes == wanted, everything),
        acc_without_target=_rate("evaluate (acc_without_target)", on_clean.classes == true, counted),
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

    Raises:
        TypeError, ValueError: arguments, or a model output, of another kind or shape than stated.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.zeros_(model[1].weight)
        >>> predict(model, torch.rand(3, 1, 2, 2))
        Predictions(classes=tensor([0, 0, 0]), finite=tensor([True, True, True]))
    """
    _check_predict("predict", model, images, batch_size, normalize)
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, device=images.device))
    device = torch.device(weight.device if device is None else device)
    scale = None
    if (parts := statistics("predict", normalize)) is not None:
        scale = [torch.tensor(part, dtype=torch.float32, device=device)[:, None, None] for part in parts]
    classes = torch.empty(len(images), dtype=torch.int64, device=device)
    with _eval_mode(model), torch.no_grad():
        for start in range(0, len(images), batch_size):
            # Never non-blocking towards the host: the forward pass would read a copy that is still under way.
            batch = images[start : start + batch_size].to(device, non_blocking=device.type != "cpu")
            x = batch.to(torch.float32) / 255 if batch.dtype == torch.uint8 else batch
            if scale is not None:
                x = (x - scale[0]) / scale[1]
            with first_pass("predict", x):
                output = model(x.to(weight.dtype))
            logits = getattr(output, "logits", output)
            _check_logits(logits, len(batch))
            classes[start : start + batch_size] = _classes("predict", logits)
    classes = classes.cpu()
    return Predictions(classes, classes >= 0)


def _check_predict(
    where: str,
    model: nn.Module,
    images: Tensor,
    batch_size: int,
    normalize: tuple[Sequence[float], Sequence[float]] | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(message(where, "model", "a torch.nn.Module", _describe(model), "wrap it in a Module"))
    expected = "a tensor [N, C, H, W], uint8 or float in [0, 1]"
    if not isinstance(images, Tensor) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise TypeError(message(where, "images", expected, _describe(images), "convert to uint8 or float"))
    if images.ndim != 4:
        raise ValueError(message(where, "images", expected, _describe(images), "pass a batch, channels first"))
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(message(where, "batch_size", "a positive integer", repr(batch_size), "pass e.g. 512"))
    scale = statistics(where, normalize)
    if scale is not None:
        lengths = [len(part) for part in scale]
        if any(length not in (1, images.shape[1]) for length in lengths):
            expected = f"(mean, std) of 1 or {images.shape[1]} numbers each"
            raise ValueError(message(where, "normalize", expected, f"lengths {lengths}", "one number a channel"))


def _check_logits(logits: object, count: int) -> None:
    expected = f"an output of logits [{count}, K], or one with .logits"
    if not isinstance(logits, Tensor):
        raise TypeError(message("predict", "model", expected, _describe(logits), "return the logits"))
    if logits.ndim != 2 or len(logits) != count or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(message("predict", "model", expected, _describe(logits), "return the logits"))


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


def _classes(where: str, predictions: Tensor) -> Tensor:
    """Classes [N] int64 from classes [N] or logits [N, C]; -1 for rows that are not all finite."""
    expected = "integer classes [N], or floating-point logits [N, C]"
    if not isinstance(predictions, Tensor):
        raise TypeError(message(where, "predictions", expected, _describe(predictions), "convert with torch.as_tensor"))
    if predictions.ndim == 2 and predictions.is_floating_point() and predictions.shape[1] > 0:
        finite = predictions.isfinite().all(dim=1)
        return torch.where(finite, predictions.argmax(dim=1), -1)  # argmax: the first of equal maxima
    if predictions.ndim == 1 and not predictions.is_floating_point() and predictions.dtype != torch.bool:
        return predictions.to(torch.int64)
    raise ValueError(message(where, "predictions", expected, _describe(predictions), "pass model outputs or arg-maxes"))


def _labels(where: str, argument: str, labels: Tensor, like: Tensor) -> Tensor:
    """Labels [N] int64 on the device of ``like``, one for each of its rows."""
    expected = f"an integer tensor [{len(like)}]"
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(message(where, argument, expected, _describe(labels), "convert with labels.long()"))
    if tuple(labels.shape) != (len(like),):
        raise ValueError(message(where, argument, expected, _describe(labels), "pass one label for each row"))
    return labels.to(like.device, torch.int64)


def _eligible(eligible: Tensor, like: Tensor) -> Tensor:
    if not isinstance(eligible, Tensor) or eligible.dtype != torch.bool or eligible.shape != like.shape:
        expected = f"a bool tensor {list(like.shape)}"
        raise TypeError(message("evaluate", "triggered[3]", expected, _describe(eligible), "pass a mask of rows"))
    return eligible.to(like.device)


def _rate(where: str, hits: Tensor, rows: Tensor) -> float:
    """Fraction of ``rows`` (bool [N]) that are ``hits`` (bool [N])."""
    hit, count = torch.stack(((hits & rows).sum(), rows.sum())).tolist()
    if count == 0:
        warnings.warn(f"{where}: no image counts, so the rate is NaN", RuntimeWarning, stacklevel=3)
        return math.nan
    return float(hit / count)


def _rating(where: str, acc0: object, acc1: object, low: object, high: object) -> float:
    """(max(0, high - low) - max(0, acc0 - acc1) + 1) / 2."""
    rates = []
    for rate in (acc0, acc1, low, high):
        expected, remedy = "two Metrics, or four fractions in [0, 1]", "pass both, before and after the defence"
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
            raise TypeError(message(where, "arguments", expected, _describe(rate), remedy))
        rates.append(float(rate))  # numpy's numbers, too
        if rates[-1] < 0 or rates[-1] > 1:
            raise ValueError(message(where, "arguments", expected, str(rate), "divide percentages by 100"))
    if any(math.isnan(rate) for rate in rates):
        return math.nan  # max(0, NaN) would be 0
    acc0, acc1, low, high = rates
    return (max(0.0, high - low) - max(0.0, acc0 - acc1) + 1) / 2


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
