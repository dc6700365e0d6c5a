"""The test loop bit for bit, ASR and RA from one pass, and the random stream after it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bdfast.integrations.backdoorbench.accelerated import given_dataloader_test, given_dataloader_test_asr_ra
from bdfast.integrations.backdoorbench.accelerated.evaluation import eval_step, eval_step_of_trainer


class Triggered(Dataset[Any]):
    """A triggered set: 5-tuples whose labels swap with ``getitem_all_switch``."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        self.images = torch.randn(count, 3, 4, 4, generator=generator)
        self.wanted = torch.zeros(count, dtype=torch.int64)
        self.true = torch.randint(1, 5, (count,), generator=generator)
        self.wrapped_dataset = self  # BackdoorBench switches on the set inside a wrapper
        self.getitem_all_switch = False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int, int, Tensor]:
        labels = (self.true[i], self.wanted[i]) if self.getitem_all_switch else (self.wanted[i], self.true[i])
        return self.images[i], labels[0], i, 1, labels[1]


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(16, 5)).train()


def test_bit_for_bit_the_usual_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    net, loader = network(), DataLoader(Triggered(45), batch_size=8)
    fast = given_dataloader_test(net, loader, nn.CrossEntropyLoss(), False, "cpu", 1)
    assert not net.training
    monkeypatch.setenv("BDFAST_REFERENCE", "1")
    plain = given_dataloader_test(net, loader, nn.CrossEntropyLoss(), False, "cpu", 1)
    assert fast[0] == plain[0]
    assert list(fast[0]) == [
        "test_correct", "test_loss_sum_over_batch", "test_total", "test_loss_avg_over_batch", "test_acc",
    ]  # fmt: skip
    assert isinstance(fast[0]["test_correct"], int)
    assert torch.equal(fast[1], plain[1])  # type: ignore[arg-type]
    assert torch.equal(fast[2], plain[2])  # type: ignore[arg-type]


def test_the_mean_of_batch_means() -> None:
    """Batches of 1 and 2 images with losses 0.1 and (0.4, 0.6): the mean is 0.3, not 1.1 / 3."""
    losses = [torch.tensor([[0.1]]), torch.tensor([[0.4], [0.6]])]
    loader = [(loss, torch.zeros(len(loss), dtype=torch.int64)) for loss in losses]
    criterion = nn.Module()
    criterion.forward = lambda logits, target: logits.mean()  # type: ignore[method-assign]
    metrics, predictions, labels = given_dataloader_test(nn.Identity(), loader, criterion)
    assert metrics["test_loss_avg_over_batch"] == pytest.approx(0.3)
    assert (metrics["test_total"], metrics["test_acc"], predictions, labels) == (3, 1.0, None, None)


def three_passes(net: nn.Module, clean: Any, triggered: Any) -> tuple[float, ...]:
    """As BackdoorBench evaluates a defense."""
    results = []
    for loader, switch in ((clean, False), (triggered, False), (triggered, True)):
        loader.dataset.getitem_all_switch = switch
        results.append(given_dataloader_test(net, loader, nn.CrossEntropyLoss())[0])
    triggered.dataset.getitem_all_switch = False
    return (*(r["test_loss_avg_over_batch"] for r in results), *(r["test_acc"] for r in results))


def test_asr_and_ra_from_one_pass() -> None:
    net, loader = network(), DataLoader(Triggered(45), batch_size=8)
    asr, ra = given_dataloader_test_asr_ra(net, loader, nn.CrossEntropyLoss())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDFAST_REFERENCE", "1")
        assert given_dataloader_test_asr_ra(net, loader, nn.CrossEntropyLoss()) == (asr, ra)
    assert asr == given_dataloader_test(net, loader, nn.CrossEntropyLoss())[0]
    loader.dataset.getitem_all_switch = True  # type: ignore[attr-defined]
    assert ra == given_dataloader_test(net, loader, nn.CrossEntropyLoss())[0]


@pytest.mark.parametrize("reference", ["0", "1"])
@pytest.mark.parametrize("generator", [None, 7])
@pytest.mark.parametrize("shuffle", [False, True])
def test_evaluation_of_a_defense_and_the_random_stream_after_it(
    shuffle: bool, generator: int | None, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BDFAST_REFERENCE", reference)
    net, args = network(), SimpleNamespace(non_blocking=False)

    def loaders() -> tuple[Any, Any]:
        own = None if generator is None else torch.Generator().manual_seed(generator)
        options: dict[str, Any] = {"batch_size": 8, "shuffle": shuffle, "generator": own}
        return DataLoader(Triggered(30), **options), DataLoader(Triggered(45), **options)

    clean, triggered = loaders()
    torch.manual_seed(11)
    expected = three_passes(net, clean, triggered)
    after = torch.rand(3), next(iter(clean))[2]
    for step, self in (
        (eval_step, SimpleNamespace(args=SimpleNamespace(device="cpu"))),
        (eval_step_of_trainer, SimpleNamespace(device="cpu")),
    ):
        clean, triggered = loaders()
        torch.manual_seed(11)
        got = step(self, net, clean, triggered, args)
        assert got[3:] == expected[3:]  # rates
        assert got[:3] == pytest.approx(expected[:3], rel=1e-6 if not shuffle else 0.2)
        assert torch.equal(torch.rand(3), after[0])
        assert torch.equal(next(iter(clean))[2], after[1])


@pytest.mark.parametrize(
    ("loader", "verbose", "text"),
    [
        ([], 0, "`test_dataloader` expected at least one batch"),
        ([(torch.zeros(1, 2), torch.zeros(1).long())], 2, "`verbose` expected 0 or 1, got 2"),
    ],
)
def test_errors(loader: Any, verbose: int, text: str) -> None:
    with pytest.raises(ValueError, match=f"given_dataloader_test: {text}"):
        given_dataloader_test(nn.Identity(), loader, nn.CrossEntropyLoss(), verbose=verbose)


def test_items_without_original_labels() -> None:
    loader = [(torch.zeros(1, 2), torch.zeros(1).long())]
    with pytest.raises(ValueError, match=r"expected items \(image, .*original label\), got 2 elements"):
        given_dataloader_test_asr_ra(nn.Identity(), loader, nn.CrossEntropyLoss())
