"""The published constants, and the one set whose constants can be computed here."""

from __future__ import annotations

import pytest
import torch

from bdfast.data import load, normalization


def test_published_constants() -> None:
    assert normalization("cifar10") == ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))
    assert normalization("cifar100") == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    assert normalization("tiny") == ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))
    assert normalization("gtsrb") == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert normalization("imagenet") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_digits_constants_are_those_of_the_images() -> None:
    (train, _), (test, _), _ = load("digits")
    pixels = torch.cat([train, test]).double() / 255
    (mean,), (std,) = normalization("digits")
    assert mean == pytest.approx(float(pixels.mean()), abs=5e-5)
    assert std == pytest.approx(float(pixels.std()), abs=5e-5)


@pytest.mark.parametrize(
    "name", ["tiny_imagenet", "tiny-imagenet", "tiny-imagenet-200", "TinyImageNet", "Tiny-ImageNet-200", "TINY"]
)
def test_names_of_tiny_imagenet(name: str) -> None:
    assert normalization(name) is normalization("tiny")


@pytest.mark.parametrize("name", ["CIFAR10", "cifar-10", "CIFAR_10"])
def test_spelling_does_not_matter(name: str) -> None:
    assert normalization(name) is normalization("cifar10")


def test_unknown_name() -> None:
    with pytest.raises(
        ValueError, match=r"normalization: `name` expected one of \['celeba', 'cifar10', .*got 'svhn'; pass mean"
    ):
        normalization("svhn")
