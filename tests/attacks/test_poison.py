from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bdfast.attacks import BadNets, PoisonedData, Relabel, WaNet, names, poison
from bdfast.errors import LabelRangeError

from .conftest import QUICK, make_set


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("float_images", [False, True])
def test_only_the_chosen_samples_change(name: str, float_images: bool, any_set: tuple[Tensor, Tensor]) -> None:
    images, labels = any_set
    if float_images:
        images = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))  # not on whole grey levels
    before, labels_before = images.clone(), labels.clone()
    data = poison(images, labels, name, rate=0.1, target=2, seed=5, **QUICK.get(name, {}))

    touched = data.is_poisoned | data.is_cover
    assert torch.equal(images, before)
    assert torch.equal(labels, labels_before)
    assert torch.equal(data.images[~touched], before[~touched])
    assert torch.equal(data.original_labels, labels)
    assert torch.equal(data.labels[~data.is_poisoned], labels[~data.is_poisoned])
    assert (data.labels[data.is_poisoned] == 2).all()
    assert data.images.dtype == images.dtype
    assert int(data.is_poisoned.sum()) == 6
    assert int(data.is_cover.sum()) == {"wanet": 12, "input_aware": 6}.get(name, 0)
    assert not (data.is_poisoned & data.is_cover).any()
    assert data.poison_indices.tolist() == data.is_poisoned.nonzero().flatten().tolist()
    assert data.cover_indices.tolist() == data.is_cover.nonzero().flatten().tolist()
    changed = (data.images[touched] != before[touched]).flatten(1).any(1)
    assert changed.all()
    if float_images:
        levels = data.images[touched].double() * 255
        assert (levels - levels.round()).abs().max() < 1e-4


@pytest.mark.parametrize("name", names())
def test_poison_is_the_train_transform_of_the_chosen(name: str) -> None:
    images, labels = make_set(80)
    data = poison(images, labels, name, rate=0.1, seed=3, **QUICK.get(name, {}))
    chosen = data.is_poisoned
    assert torch.equal(data.images[chosen], data.attack.apply(images[chosen], "poison", seed=3))
    assert torch.equal(data.images[data.is_cover], data.attack.apply(images[data.is_cover], "cover", seed=3))


@pytest.mark.parametrize("name", names())
def test_the_seed_decides_and_the_global_state_stays(name: str) -> None:
    images, labels = make_set(100)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    quick = QUICK.get(name, {})
    first = poison(images, labels, name, rate=0.05, seed=0, **quick)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (poison(images, labels, name, rate=0.05, seed=seed, **quick) for seed in (0, 1))
    for field in ("images", "labels", "is_poisoned", "is_cover"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert first.attack == again.attack
    assert not torch.equal(first.is_poisoned, other.is_poisoned)


def test_wanet_draws_one_grid_a_run() -> None:
    images, labels = make_set(100)
    first, other = (poison(images, labels, "wanet", seed=seed) for seed in (0, 1))
    assert first.attack == WaNet(grid_seed=0)
    a, b = (data.trigger(images[:4], labels[:4]).images for data in (first, other))
    assert not torch.equal(a, b)
    fixed = poison(images, labels, WaNet(grid_seed=0), seed=1)
    assert torch.equal(fixed.trigger(images[:4], labels[:4]).images, a)
    one = first.poison_indices[:1]
    assert torch.equal(first.trigger(images[one], labels[one]).images, first.images[one])


def test_trigger_marks_what_counts() -> None:
    images, labels = make_set(30)
    data = poison(images, labels, "badnets", rate=0.1, target=4)
    triggered = data.trigger(images, labels)
    test_images, attack_labels, original_labels = triggered[:3]
    assert torch.equal(test_images, BadNets().apply(images))
    assert attack_labels.tolist() == [4] * 30
    assert torch.equal(original_labels, labels)
    assert torch.equal(triggered.eligible, labels != 4)
    assert int(triggered.eligible.sum()) == 27


def test_clean_label_attacks_are_triggered_on_all_classes() -> None:
    images, labels = make_set(30)
    triggered = poison(images, labels, "sig", target=4).trigger(images, labels)
    assert (triggered.images != images).flatten(1).any(1).all()
    assert torch.equal(triggered.eligible, labels != 4)


def test_all_to_all_shifts_by_one_and_counts_everything() -> None:
    images, labels = make_set(30, classes=3)
    data = poison(images, labels, "badnets", rate=0.5, mode="all-to-all")
    assert torch.equal(data.labels[data.is_poisoned], (labels[data.is_poisoned] + 1) % 3)
    triggered = data.trigger(images, labels)
    assert torch.equal(triggered.labels, (labels + 1) % 3)
    assert triggered.eligible.all()
    wide = poison(images, labels, "badnets", mode="all-to-all", num_classes=10).trigger(images, labels)
    assert wide.labels.max() == 3


def test_without_quantising_float_images_keep_fractions() -> None:
    images = torch.full((10, 1, 8, 8), 0.5)
    labels = torch.zeros(10, dtype=torch.long)
    data = poison(images, labels, "blended", rate=1.0, alpha=0.2, pattern=torch.full((1, 1), 0.3), quantize=False)
    torch.testing.assert_close(data.images, torch.full_like(images, 0.8 * 0.5 + 0.2 * 0.3))
    torch.testing.assert_close(data.trigger(images, labels).images, data.images)
    whole = poison(images, labels, "blended", rate=1.0, alpha=0.2, pattern=torch.full((1, 1), 0.3))
    assert torch.equal(whole.images, torch.full_like(images, 117) / 255)  # 0.46 * 255 = 117.3


def test_poisoned_images_survive_png(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    import numpy as np

    images, labels = make_set(20)
    for name in names():
        data = poison(images, labels, name, rate=0.1, **QUICK.get(name, {}))
        for index in data.poison_indices.tolist():
            image.fromarray(data.images[index].permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
            back = torch.from_numpy(np.array(image.open(tmp_path / "x.png"))).permute(2, 0, 1)
            assert torch.equal(back, data.images[index])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_other_integer_types_come_back_as_int64(dtype: torch.dtype) -> None:
    images, labels = make_set(20)
    data = poison(images, labels.to(dtype), "badnets", target=9)
    assert data.labels.dtype == data.original_labels.dtype == torch.int64
    assert data.trigger(images, labels.to(dtype)).labels.dtype == torch.int64


def test_nothing_to_poison() -> None:
    images, labels = make_set(20)
    data = poison(images, labels, "badnets", rate=0)
    assert torch.equal(data.images, images)
    assert data.poison_indices.numel() == 0
    empty = poison(images[:0], labels[:0], "wanet")
    assert empty.images.shape == (0, 3, 32, 32)
    assert empty.trigger(images[:0], labels[:0]).eligible.shape == (0,)


def test_the_result_is_independent_of_the_input() -> None:
    images, labels = make_set(20)
    data = poison(images, labels, "badnets", rate=0)
    images.zero_()
    labels.zero_()
    assert data.images.any()
    assert data.labels.any()
    assert data.original_labels.any()


def test_image_errors() -> None:
    _, labels = make_set(4)
    good = torch.zeros(4, 1, 8, 8)
    cases: list[tuple[type[Exception], Tensor, str]] = [
        (TypeError, good.long(), "got torch.int64"),
        (ValueError, good[:, 0], r"got torch.float32 \[4, 8, 8\]"),
        (ValueError, good[..., :0], r"got torch.float32 \[4, 1, 8, 0\]"),
        (ValueError, good + 255, "got values from 255 to 255"),
        (ValueError, good - 0.1, "undo the normalisation"),
        (ValueError, good * float("nan"), "got values from nan to nan"),
    ]
    for kind, images, text in cases:
        with pytest.raises(kind, match=rf"poison: `images` expected a tensor \[N, C, H, W\].*{text}"):
            poison(images, labels, "badnets")


def test_label_errors() -> None:
    images, labels = make_set(4)
    with pytest.raises(TypeError, match="poison: `labels` expected an integer tensor"):
        poison(images, labels.float(), "badnets")
    with pytest.raises(TypeError, match=r"`labels`.*got list"):
        poison(images, [0, 1, 2, 3], "badnets")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"an integer tensor \[4\], one class for each image, got torch.int64 \[3\]"):
        poison(images, labels[:3], "badnets")
    with pytest.raises(LabelRangeError, match="below num_classes=3, got labels from 0 to 3"):
        poison(images, labels, "badnets", num_classes=3)
    with pytest.raises(LabelRangeError, match="labels from -1"):
        poison(images, labels - 1, "badnets")


def test_argument_errors() -> None:
    images, labels = make_set(20)
    with pytest.raises(LabelRangeError, match="`target` expected a class below num_classes=10, got 10"):
        poison(images, labels, "badnets", target=10, num_classes=10)
    with pytest.raises(
        LabelRangeError, match="`target` expected a class of the labels, got 99, above the highest label"
    ):
        poison(images, labels, "badnets", target=99)
    assert poison(images, labels, "badnets", target=99, num_classes=100).relabel.target == 99
    assert poison(images, torch.zeros_like(labels), "badnets", target=1).relabel.target == 1
    with pytest.raises(ValueError, match="`target` expected an integer of at least 0"):
        poison(images, labels, "badnets", target=-1)
    with pytest.raises(ValueError, match="`mode` expected one of all-to-one, all-to-all, got 'one'"):
        poison(images, labels, "badnets", mode="one")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`mode` expected 'all-to-one' for sig"):
        poison(images, labels, "sig", mode="all-to-all")
    with pytest.raises(ValueError, match="`seed` expected an integer"):
        poison(images, labels, "badnets", seed=-1)
    with pytest.raises(ValueError, match="`quantize` expected True for uint8 images"):
        poison(images, labels, "badnets", quantize=False)
    with pytest.raises(TypeError, match="`attack` expected no options beside an attack object, got size"):
        poison(images, labels, BadNets(), size=3)
    with pytest.raises(TypeError, match=r"`attack` expected one of .*badnets"):
        poison(images, labels, BadNets)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`num_classes` expected the number of classes for all-to-all"):
        Relabel("all-to-all")


def test_trigger_errors() -> None:
    images, labels = make_set(20)
    data: PoisonedData = poison(images, labels, "badnets", num_classes=10)
    with pytest.raises(ValueError, match=r"PoisonedData.trigger: `images` expected images of \[3, 32, 32\]"):
        data.trigger(images[:, :, :16], labels)
    with pytest.raises(ValueError, match=r"PoisonedData.trigger: `labels` expected an integer tensor \[20\]"):
        data.trigger(images, labels[:5])
    with pytest.raises(LabelRangeError, match=r"PoisonedData.trigger: `labels`"):
        data.trigger(images, labels + 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", names())
def test_devices_agree(name: str) -> None:
    images, labels = make_set(60)
    host = poison(images, labels, name, rate=0.1, seed=1, **QUICK.get(name, {}))
    device = poison(images.cuda(), labels.cuda(), name, rate=0.1, seed=1, **QUICK.get(name, {}))
    assert torch.equal(host.is_poisoned, device.is_poisoned.cpu())
    worst = (host.images.int() - device.images.cpu().int()).abs().max()
    assert worst <= (1 if name in ("wanet", "physical_ba") else 0)


def test_numbers_of_numpy_are_numbers() -> None:
    """As they come out of a loop over numpy's seeds and rates."""
    images, labels = torch.zeros(20, 1, 8, 8), torch.arange(20) % 4
    usual = poison(images, labels, "badnets", rate=0.25, target=1, seed=3, num_classes=4, size=2)
    data = poison(
        images, labels, "badnets", rate=np.float32(0.25), target=np.int64(1), seed=np.int64(3), num_classes=np.int32(4),
        size=np.int64(2),
    )  # fmt: skip
    assert torch.equal(data.images, usual.images)
    assert torch.equal(data.labels, usual.labels)
    assert [type(value) for value in (data.seed, data.relabel.target, data.relabel.num_classes)] == [int] * 3
