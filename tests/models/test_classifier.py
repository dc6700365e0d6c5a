from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bdfast import models
from bdfast.models import classifier_layers
from bdfast.models.classifier import classifier_heads
from bdfast.nn import normalized


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in classifier_layers(model)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("preact_resnet18", [("linear", 512, 10)]),
        ("resnet34", [("fc", 512, 10)]),
        ("vgg19_bn", [("classifier.0", 25088, 4096), ("classifier.3", 4096, 4096), ("classifier.6", 4096, 10)]),
        ("mobilenet_v2", [("classifier.1", 1280, 10)]),
        ("digits_cnn", [("linear", 64, 10)]),
    ],
)
def test_heads_of_our_models(name: str, expected: list[tuple[str, int, int]]) -> None:
    with torch.device("meta"):
        model = models.build(name, num_classes=10)
    assert [(n, layer.in_features, layer.out_features) for n, layer in classifier_layers(model)] == expected
    wrapped = classifier_layers(normalized(model, 0.5, 0.25))
    assert [n for n, _ in wrapped] == [f"model.{n}" for n, _, _ in expected]
    assert [id(layer) for _, layer in wrapped] == [id(layer) for _, layer in classifier_layers(model)]


def test_a_transformer_gives_its_head_only() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, norm=nn.LayerNorm(8), enable_nested_tensor=False
    )
    assert names(nn.Sequential(encoder, nn.Linear(8, 10))) == ["1"]
    # no norm in between: attention is no activation, though torch files it there, and its projection is no head
    assert names(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Dropout(), nn.Linear(8, 10))) == ["2"]


class Swish(nn.Module):
    pass


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bound", torch.ones(4))


class RootMeanSquareNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize(
    ("between", "run"),
    [
        (nn.ReLU(), 2),
        (nn.GELU(), 2),
        (nn.PReLU(), 2),
        (nn.Hardswish(), 2),
        (nn.Softmax(-1), 2),
        (nn.Dropout(), 2),
        (nn.AlphaDropout(), 2),
        (nn.Flatten(), 2),
        (nn.Identity(), 2),
        (Swish(), 2),
        (Clip(), 2),
        (RootMeanSquareNorm(), 1),
        (nn.Sequential(nn.ReLU(), nn.Dropout()), 2),
        (nn.BatchNorm1d(4), 1),
        (nn.LayerNorm(4), 1),
        (nn.AvgPool1d(1), 1),
        (nn.Conv1d(1, 1, 1), 1),
        (nn.Embedding(2, 4), 1),
    ],
)
def test_what_interrupts_the_run(between: nn.Module, run: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4), between, nn.Linear(4, 2))
    assert names(model) == ["1", "3"][-run:]


class Late(nn.Module):
    """Registers a pool and a loss behind the head, and the whole model a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
        self.head = nn.Linear(4, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.loss = nn.CrossEntropyLoss()
        self.alias = nn.Sequential(self.body, self.head)


def test_what_stands_behind_the_head_does_not_matter() -> None:
    assert names(Late()) == ["head"]
    assert names(nn.Linear(2, 2)) == [""]
    assert names(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == ["0", "1"]


class NormLinear(nn.Module):
    """timm's head of a LeViT."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(inputs)
        self.drop = nn.Dropout(0.0)
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.drop(self.bn(x)))


class Distilled(nn.Module):
    """Two heads, whose logits are averaged unless it is distilled."""

    def __init__(self, head: Callable[[], nn.Module], head_dist: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4))
        self.head = head()
        self.head_dist = head_dist()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return (self.head(x) + self.head_dist(x)) / 2


def test_both_heads_of_a_distilled_model() -> None:
    levit = Distilled(lambda: NormLinear(4, 3), lambda: NormLinear(4, 3))
    assert names(levit) == ["head.linear", "head_dist.linear"]
    assert names(normalized(levit, 0.5, 0.25)) == ["model.head.linear", "model.head_dist.linear"]
    deit = Distilled(lambda: nn.Linear(4, 3), lambda: nn.Linear(4, 3))
    assert names(deit) == ["head", "head_dist"]
    inside = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4))
    inside.add_module("classifier", levit)  # as RepViT has them
    assert names(inside) == ["classifier.head.linear", "classifier.head_dist.linear"]
    for model in (levit, deit, inside):
        assert [name for name, _ in classifier_heads(model)] == names(model)


def test_layers_in_a_row_are_no_heads_side_by_side() -> None:
    def block(*sizes: int) -> nn.Sequential:
        pairs = [(nn.BatchNorm1d(a), nn.Linear(a, b)) for a, b in itertools.pairwise(sizes)]
        return nn.Sequential(*(module for pair in pairs for module in pair))

    assert names(nn.Sequential(block(4, 4), block(4, 4))) == ["1.1"]  # one feeds the other
    assert names(nn.Sequential(block(4, 8, 4), block(4, 8, 4))) == ["1.3"]
    assert names(nn.Sequential(block(4, 3), nn.LayerNorm(3), block(4, 3))) == ["2.1"]  # not side by side
    assert names(nn.Sequential(block(5, 3), block(4, 3))) == ["1.1"]  # an auxiliary head of an inner layer
    mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert [name for name, _ in classifier_heads(mlp)] == ["2"]


def test_a_head_that_the_model_has_twice_counts_once() -> None:
    one = NormLinear(4, 3)
    assert len(names(Distilled(lambda: one, lambda: one))) == 1


def test_models_without_a_linear_head() -> None:
    text = r"classifier_layers: `model` expected a model that ends in nn\.Linear, got Conv2d \(`1`\); end it in one"
    with pytest.raises(ValueError, match=text):
        classifier_layers(nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1), nn.Flatten()))
    with pytest.raises(ValueError, match="got none"):
        classifier_layers(nn.Sequential(nn.ReLU()))
