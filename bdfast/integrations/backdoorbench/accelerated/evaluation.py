"""The test loop, without a wait a batch, and both rates of a triggered set from one pass.

BackdoorBench measures a model in three passes over loaders: clean accuracy, attack success rate (labels of the
triggered set are the attack's), and robust accuracy (the same images again, with their original labels). The last two
share their logits. Counts and losses stay on the device until a pass is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bdfast.errors import message
from bdfast.integrations.backdoorbench.accelerated.switch import reference_requested, switchable

Metrics = dict[str, Any]
Tested = tuple[Metrics, Tensor | None, Tensor | None]

_WHERE = "given_dataloader_test"


def plain_given_dataloader_test(
    model: nn.Module,
    test_dataloader: Iterable[Any],
    criterion: nn.Module,
    non_blocking: bool = False,
    device: Any = "cpu",
    verbose: int = 0,
) -> Tested:
    """The usual loop: two waits a batch."""
    model.to(device, non_blocking=non_blocking).eval()
    criterion = criterion.to(device)
    correct, total, batches, loss_sum = 0, 0, 0, 0.0
    predictions, labels = [], []
    with torch.no_grad():
        for x, target, *_ in test_dataloader:
            x, target = (t.to(device, non_blocking=non_blocking) for t in (x, target))
            logits = model(x)
            predicted = logits.argmax(dim=-1)
            correct += (predicted == target).sum().item()
            loss_sum += criterion(logits, target.long()).item()
            total += len(target)
            batches += 1
            predictions.append(predicted.cpu())
            labels.append(target.cpu())
    metrics = _metrics(correct, loss_sum, total, batches)
    return (metrics, torch.cat(predictions), torch.cat(labels)) if verbose == 1 else (metrics, None, None)


@switchable(plain_given_dataloader_test)
def given_dataloader_test(
    model: nn.Module,
    test_dataloader: Iterable[Any],
    criterion: nn.Module,
    non_blocking: bool = False,
    device: Any = "cpu",
    verbose: int = 0,
) -> Tested:
    """Loss and accuracy over a loader, bit for bit those of the usual loop.

    Args:
        model: images to logits [B, K]; moved to ``device`` and left there in eval mode, as the usual loop does.
        test_dataloader: yields ``(images, labels, ...)``.
        criterion: of logits and labels, to a scalar.
        non_blocking: of the copies to the device.
        device: where to run.
        verbose: 1 also returns predictions and labels.

    Returns:
        ``(metrics, predictions, labels)``: a dict with ``test_correct``, ``test_loss_sum_over_batch``, ``test_total``,
        ``test_loss_avg_over_batch`` (a mean of batch means: a smaller last batch counts as much as the others) and
        ``test_acc`` in [0, 1]; int64 ``[N]`` on the CPU, or None with ``verbose=0``.

    Raises:
        ValueError: ``verbose`` is neither 0 nor 1, or the loader is empty.

    Example:
        >>> loader = [(torch.eye(2), torch.tensor([0, 0])), (torch.eye(2), torch.tensor([0, 1]))]
        >>> metrics, predictions, _ = given_dataloader_test(nn.Identity(), loader, nn.CrossEntropyLoss(), verbose=1)
        >>> metrics["test_acc"], predictions
        (0.75, tensor([0, 1, 0, 1]))
    """
    if verbose not in (0, 1):
        raise ValueError(message(_WHERE, "verbose", "0 or 1", repr(verbose), "1 returns predictions and labels"))
    tally = _run(model, test_dataloader, criterion, non_blocking, device, columns=(1,))
    (metrics,) = tally.metrics()
    if verbose == 0:
        return metrics, None, None
    return metrics, torch.cat(tally.predictions).cpu(), torch.cat(tally.labels).cpu()


def plain_given_dataloader_test_asr_ra(
    model: nn.Module,
    test_dataloader: Iterable[Any],
    criterion: nn.Module,
    non_blocking: bool = False,
    device: Any = "cpu",
) -> tuple[Metrics, Metrics]:
    """The usual loop, once for each kind of labels."""

    def labelled(place: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((item[0], item[place]) for item in test_dataloader)

    asr, ra = (
        plain_given_dataloader_test(model, labelled(place), criterion, non_blocking, device)[0] for place in (1, 4)
    )
    return asr, ra


@switchable(plain_given_dataloader_test_asr_ra)
def given_dataloader_test_asr_ra(
    model: nn.Module,
    test_dataloader: Iterable[Any],
    criterion: nn.Module,
    non_blocking: bool = False,
    device: Any = "cpu",
) -> tuple[Metrics, Metrics]:
    """Metrics against the attack's labels (ASR) and against the original ones (RA), from one pass.

    Args:
        model: as :func:`given_dataloader_test`.
        test_dataloader: yields ``(images, attack labels, indices, poison flags, original labels)``: a triggered test
            set of BackdoorBench with ``getitem_all_switch = False``.
        criterion: as :func:`given_dataloader_test`.
        non_blocking: of the copies to the device.
        device: where to run.

    Returns:
        Two dicts, as :func:`given_dataloader_test` returns them for the one and for the other labels.

    Raises:
        ValueError: the loader is empty, or its items have no original labels.

    Example:
        >>> x, wanted, true = torch.eye(2), torch.tensor([0, 0]), torch.tensor([1, 1])
        >>> loader = [(x, wanted, torch.arange(2), torch.ones(2), true)]
        >>> asr, ra = given_dataloader_test_asr_ra(nn.Identity(), loader, nn.CrossEntropyLoss())
        >>> asr["test_acc"], ra["test_acc"]
        (0.5, 0.5)
    """
    asr, ra = _run(model, test_dataloader, criterion, non_blocking, device, columns=(1, 4)).metrics()
    return asr, ra


class _Tally:
    """Sums over batches, one for each kind of labels, on the device: losses in float64, as the usual loop adds them."""

    def __init__(self, kinds: int, device: torch.device) -> None:
        self.correct = torch.zeros(kinds, dtype=torch.int64, device=device)
        self.loss = torch.zeros(kinds, dtype=torch.float64, device=device)
        self.total = 0
        self.batches = 0
        self.predictions: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, logits: Tensor, targets: list[Tensor], criterion: nn.Module) -> None:
        predicted = logits.argmax(dim=-1)
        self.correct += torch.stack([(predicted == target).sum() for target in targets])
        self.loss += torch.stack([criterion(logits, target.long()) for target in targets])
        self.total += len(predicted)
        self.batches += 1
        self.predictions.append(predicted)
        self.labels.append(targets[0])

    def metrics(self) -> list[Metrics]:
        """The only wait for the device."""
        if self.batches == 0:
            raise ValueError(message(_WHERE, "test_dataloader", "at least one batch", "none", "pass the test set"))
        pairs = zip(self.correct.tolist(), self.loss.tolist(), strict=True)
        return [_metrics(correct, loss, self.total, self.batches) for correct, loss in pairs]


def _run(
    model: nn.Module,
    loader: Iterable[Any],
    criterion: nn.Module,
    non_blocking: bool,
    device: Any,
    columns: tuple[int, ...],
) -> _Tally:
    model.to(device, non_blocking=non_blocking).eval()
    criterion = criterion.to(device)
    tally = _Tally(len(columns), torch.device(device))
    with torch.no_grad():
        for item in loader:
            if len(item) <= max(columns):
                expected = "items (image, label, index, flag, original label)"
                remedy = "pass BackdoorBench's triggered test set"
                raise ValueError(message(_WHERE, "test_dataloader", expected, f"{len(item)} elements", remedy))
            x, *targets = (item[place].to(device, non_blocking=non_blocking) for place in (0, *columns))
            tally.add(model(x), targets, criterion)
    return tally


def _metrics(correct: int, loss: float, total: int, batches: int) -> Metrics:
    return {
        "test_correct": correct,
        "test_loss_sum_over_batch": loss,
        "test_total": total,
        "test_loss_avg_over_batch": loss / batches,
        "test_acc": correct / total,
    }


# --- the evaluation of a defense -------------------------------------------------------------------------------------

Evaluated = tuple[float, float, float, float, float, float]


def _evaluate(model: nn.Module, clean_loader: Any, bd_loader: Any, args: Any, device: Any) -> Evaluated:
    criterion = nn.CrossEntropyLoss()
    clean, _, _ = given_dataloader_test(model, clean_loader, criterion, args.non_blocking, device)
    asr, ra = given_dataloader_test_asr_ra(model, bd_loader, criterion, args.non_blocking, device)
    if not reference_requested():  # which makes the third pass
        _draw_as_one_more_pass(bd_loader)
    losses = (tested["test_loss_avg_over_batch"] for tested in (clean, asr, ra))
    rates = (tested["test_acc"] for tested in (clean, asr, ra))
    return (*losses, *rates)  # type: ignore[return-value]


def _draw_as_one_more_pass(loader: Any) -> None:
    """Take from the random streams what the pass that is saved would have taken: training goes on as it would have."""
    if getattr(loader, "batch_sampler", None) is not None:
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # an iterator's seed for its workers
        for _ in loader.batch_sampler:
            pass


def eval_step(self: Any, netC: nn.Module, clean_test_dataloader: Any, bd_test_dataloader: Any, args: Any) -> Evaluated:
    """``eval_step`` of ABL, SAU and I-BAU in two passes: mean losses and accuracies, clean, ASR and RA each.

    Rates are those of three passes; where the loader shuffles, the mean loss of RA is over other batches.

    Returns:
        ``(clean loss, ASR loss, RA loss, ACC, ASR, RA)``.
    """
    return _evaluate(netC, clean_test_dataloader, bd_test_dataloader, args, self.args.device)


def eval_step_of_trainer(
    self: Any, model: nn.Module, clean_test_loader: Any, bd_test_loader: Any, args: Any
) -> Evaluated:
    """``eval_step`` of FT-SAM and D-BR, the same under other names; ``self.device`` is where it runs."""
    return _evaluate(model, clean_test_loader, bd_test_loader, args, self.device)
