"""Detoxify a checkpoint and data of your own, whose model does not normalise its input.

    python examples/own_checkpoint.py

A stand-in for your files is made first: a torch checkpoint of an ordinary module, trained on normalised images. Then
the steps that you would take. Prints how far D3 moved the classifier, and the accuracy before and after.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import bdfast
from bdfast.defenses import D3Config
from bdfast.runtime.checkpoints import load_into, load_state, save_state
from bdfast.training import TrainConfig

MEAN, STD = (0.3053,), (0.3759,)  # one number a channel, for images in [0, 1]


class YourNetwork(nn.Module):
    """Any module from normalised images [N, C, H, W] to logits [N, K]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()
        )
        self.classifier = nn.Linear(32 * 3 * 3, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def make_your_checkpoint(path: Path, images: Tensor, labels: Tensor) -> None:
    """What you have already."""
    network = YourNetwork()
    config = TrainConfig.for_digits(epochs=8)
    bdfast.training.train_classifier(network, (images, labels), config, normalize=(MEAN, STD))
    torch.save({"state_dict": network.state_dict(), "epoch": 8}, path)


def accuracy(network: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Of clean test images."""
    predictions = bdfast.metrics.predict(network, test[0], normalize=(MEAN, STD))
    return bdfast.metrics.accuracy(predictions.classes, test[1])


def main() -> None:
    """Load, detoxify, save."""
    torch.set_num_threads(1)  # 8x8 images keep one thread busy at best
    torch.manual_seed(0)
    (images, labels), test, _ = bdfast.data.load("digits")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "yours.pt"
        make_your_checkpoint(path, images, labels)

        # 1. Weights, read without running anything that the file says; names and shapes have to fit.
        checkpoint = load_state(path)
        network = YourNetwork()
        load_into(network, checkpoint.state, str(path))

        # 2. A few hundred clean images with their labels, uint8 or float in [0, 1]: not normalised, D3 does that.
        clean = (images[:200], labels[:200])
        result = bdfast.defenses.d3(network, clean, D3Config.for_digits(epochs=25), normalize=(MEAN, STD))

        # 3. Weights for whoever loads your checkpoints, in a file that can hold no code.
        save_state(path.with_suffix(".safetensors"), result.model.state_dict(), {"defense": "d3"})
        print(f"metadata of the checkpoint: {checkpoint.metadata}")
        print(f"layers moved: {', '.join(result.layers)}; distance {result.history[-1]['distance']['classifier']:.2f}")
        print(f"accuracy before {accuracy(network, test):.1%}, after {accuracy(result.model, test):.1%}")


if __name__ == "__main__":
    main()
