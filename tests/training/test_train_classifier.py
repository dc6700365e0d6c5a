"""The classifier trainer, its loop's options, and the runtime it stands on."""

from __future__ import annotations

import copy
import importlib
import io
import os
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bdfast.runtime import Augment
from bdfast.runtime.determinism import deterministic_kernels, searched_kernels
from bdfast.runtime.precision import autocast
from bdfast.runtime.progress import Progress
from bdfast.training import TrainConfig, train_classifier
from bdfast.training.options import augmentation, can_fuse

QUICK = TrainConfig(epochs=4, batch_size=8, lr=0.1, augment="none")


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 3
    return (torch.rand(60, 1, 6, 6, generator=g) + labels[:, None, None, None]) / 4, labels


@pytest.fixture
def net() -> nn.Sequential:
    g = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        for layer in (layers[0], layers[4]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=g) * 0.2)
            layer.bias.zero_()
    return layers


def bits(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_it_learns_in_place_and_repeats_itself(net: nn.Sequential, data: tuple[Tensor, Tensor], schedule: Any) -> None:
    twin = copy.deepcopy(net)
    config = TrainConfig(epochs=12, batch_size=8, lr=0.04, augment="none", schedule=schedule)
    records: list[dict[str, Any]] = []
    result = train_classifier(net, data, config, records.append)
    assert result.model is net
    assert result.history == records
    assert records[-1]["accuracy"] > 0.9
    train_classifier(twin, data, config)
    assert equal(bits(net), bits(twin))
    if schedule == "one_cycle":
        assert records[3]["lr"] > records[0]["lr"] > records[-1]["lr"]
    else:
        assert records[6]["lr"] == pytest.approx(0.02)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_checkpoint_resumes_bit_identically(
    net: nn.Sequential, data: tuple[Tensor, Tensor], tmp_path: Path, schedule: Any
) -> None:
    config = TrainConfig(epochs=4, batch_size=8, lr=0.1, augment=Augment(1, True), schedule=schedule)
    straight, path = copy.deepcopy(net), tmp_path / "run.pt"
    train_classifier(straight, data, config)
    before = bits(net)

    def interrupt(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_classifier(net, data, config, interrupt, checkpoint=path)
    assert equal(bits(net), before)
    result = train_classifier(net, data, config, checkpoint=path)
    assert equal(bits(net), bits(straight))
    assert [record["epoch"] for record in result.history] == [1, 2, 3, 4]


@pytest.mark.parametrize("part", ["model", "optimizer", "schedule", "rng", "history"])
@pytest.mark.parametrize("value", [None, {}, [torch.zeros(3)], {"conv": torch.zeros(3)}])
def test_checkpoint_with_a_part_of_another_kind(
    net: nn.Sequential, data: tuple[Tensor, Tensor], tmp_path: Path, part: str, value: Any
) -> None:
    if part == "history" and isinstance(value, (list, dict)):
        pytest.skip("whatever a list holds is only told")
    path, before = tmp_path / "run.pt", bits(net)

    def interrupt(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_classifier(net, data, QUICK, interrupt, checkpoint=path)
    content = torch.load(path)
    torch.save({**content, part: value}, path)
    with pytest.raises(
        ValueError, match=r"checkpoint: `.*run\.pt` expected a checkpoint of this very run, got a damaged"
    ):
        train_classifier(net, data, QUICK, checkpoint=path)
    assert equal(bits(net), before)


def test_channels_last_and_bfloat16(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    results = {}
    for name, changes in {"plain": {}, "last": {"channels_last": True}, "half": {"precision": "bf16"}}.items():
        results[name] = train_classifier(
            copy.deepcopy(net), data, TrainConfig(epochs=2, batch_size=20, augment="none", **changes)
        ).model
    for name, tolerance in (("last", 1e-4), ("half", 0.1)):
        for p, q in zip(results["plain"].parameters(), results[name].parameters(), strict=True):
            assert p.dtype == q.dtype == torch.float32
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_compiled_steps_leave_the_model_as_it_is(
    net: nn.Sequential, data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # what inductor does is not ours
    twin, names = copy.deepcopy(net), list(net.state_dict())
    config = TrainConfig(epochs=2, batch_size=25, lr=0.1, augment="none", compile=True)
    assert train_classifier(net, data, config).model is net
    train_classifier(twin, data, replace(config, compile=False))
    assert list(net.state_dict()) == names
    assert not net[0]._forward_hooks
    for a, b in zip(bits(net), bits(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_fused_steps_are_those_of_plain_sgd(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    assert can_fuse(list(net.parameters()))
    assert not can_fuse(list(copy.deepcopy(net).half().parameters()))
    for channels_last in (False, True):
        runs = []
        for fused in (True, False):
            model = copy.deepcopy(net)
            with pytest.MonkeyPatch.context() as patch:
                module = importlib.import_module("bdfast.training.train_classifier")
                patch.setattr(module, "can_fuse", lambda _, fused=fused: fused)
                train_classifier(model, data, replace(QUICK, channels_last=channels_last, epochs=2))
            runs.append(bits(model))
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_fast_recipe(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    config = TrainConfig.fast_cifar10(lr=0.04, batch_size=8)
    assert (config.schedule, config.precision, config.channels_last) == ("one_cycle", "bf16", None)
    assert train_classifier(net, data, config).history[-1]["accuracy"] > 0.8


def test_wrong_options(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="TrainConfig: `schedule` expected one of cosine, one_cycle, got 'step'"):
        TrainConfig(schedule="step")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="TrainConfig: `channels_last` expected True, False or None, got 1"):
        TrainConfig(channels_last=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="TrainConfig: `compile` expected True or False, got 'yes'"):
        TrainConfig(compile="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="TrainConfig: `weight_decay` expected a finite number"):
        TrainConfig(weight_decay=float("inf"))
    with pytest.raises(TypeError, match="train_classifier: `config` expected a TrainConfig, got dict"):
        train_classifier(net, data, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`model` expected parameters to train, got none"):
        train_classifier(nn.Flatten(), data, QUICK)
    with pytest.raises(ValueError, match=r"`model` expected an output of logits \[2, K\].*got \[2, 4, 4, 4\]"):
        train_classifier(net[:2], data, QUICK)


def test_augmentation_scales_with_the_image() -> None:
    assert augmentation("crop+flip", (3, 32, 32)) == Augment(crop_padding=4, flip=True)
    assert augmentation("crop", (3, 64, 80)) == Augment(crop_padding=8, flip=False)
    assert augmentation("auto", (10, 1, 8, 8)) == Augment(crop_padding=1, flip=False)
    assert augmentation("auto", (10, 3, 4, 4)) == Augment(crop_padding=1, flip=True)
    assert augmentation("none", (3, 32, 32)) == Augment.none()
    assert augmentation(Augment(3, False), (3, 32, 32)) == Augment(3, False)


def test_precision_holds_whatever_the_caller_runs_under() -> None:
    a = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), autocast(a.device, "fp32"):
        assert (a @ a).dtype == torch.float32
    with autocast(a.device, "bf16"):
        assert (a @ a).dtype == torch.bfloat16


def test_deterministic_kernels_are_switched_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_kernels(True, torch.device("cuda:0")):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("repeated", [False, True])
def test_convolutions_are_searched_for_unless_deterministic(deterministic: bool, repeated: bool) -> None:
    before, gpu = torch.backends.cudnn.benchmark, torch.device("cuda:0")
    with deterministic_kernels(deterministic, gpu):
        with searched_kernels(gpu, repeated):
            assert torch.backends.cudnn.benchmark is (repeated and not deterministic)
        with searched_kernels(torch.device("cpu"), repeated):
            assert torch.backends.cudnn.benchmark is before
    assert torch.backends.cudnn.benchmark is before


def test_the_last_batch_of_an_epoch_is_not_searched_for(
    net: nn.Sequential, data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def note(device: torch.device, repeated: bool) -> Any:
        asked.append(repeated)
        return nullcontext()

    monkeypatch.setattr("bdfast.training.loop.searched_kernels", note)
    train_classifier(net, (data[0][:10], data[1][:10]), TrainConfig(epochs=1, batch_size=4, augment="none"))
    assert asked == [True, True, False]


def test_nothing_is_read_back_within_an_epoch(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    counts = []
    for batch_size in (30, 4):  # 2 steps, 15 steps
        with Reads() as reads:
            train_classifier(copy.deepcopy(net), data, TrainConfig(epochs=1, batch_size=batch_size))
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_progress_rewrites_its_line_on_a_terminal_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        progress = Progress("ft", stream)
        for epoch in (1, 2):
            progress({"epoch": epoch, "epochs": 2, "loss": 0.5})
    assert plain.getvalue() == "ft 1/2  loss 0.5\nft 2/2  loss 0.5\n"
    assert terminal.getvalue() == "\r\033[Kft 1/2  loss 0.5\r\033[Kft 2/2  loss 0.5\n"
