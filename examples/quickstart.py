"""Detoxify a backdoored network, from start to finish on a CPU.

    python examples/quickstart.py

Prints ACC (accuracy on clean test images), ASR (triggered images that go where the attacker wants) and RA (triggered
images that are recognised all the same) before and after D3. Expect an ASR of 100 % before and of a few percent after.
"""

from __future__ import annotations

import torch

import bdfast
from bdfast.defenses import D3Config
from bdfast.training import TrainConfig

torch.set_num_threads(1)  # 8x8 images keep one thread busy at best

# 1. Data: the victim's training set, test images, and 210 clean images that the defender holds.
(images, labels), test, class_names = bdfast.data.load("digits")
reserve = bdfast.data.reserve(labels, ratio=0.15, seed=0)
rest = torch.ones(len(labels), dtype=torch.bool)
rest[reserve] = False

# 2. The attack: a white 3x3 corner on 10 % of the training images, which are then labelled 0; and a victim.
poisoned = bdfast.attacks.poison(images[rest], labels[rest], "badnets", rate=0.1, target=0, seed=0)
normalize = bdfast.data.normalization("digits")
model = bdfast.models.build("digits_cnn", num_classes=len(class_names), image_size=8, normalize=normalize, seed=0)
bdfast.training.train_classifier(model, poisoned, TrainConfig.for_digits(epochs=8))

# 3. The defense sees the model and the clean images, neither the trigger nor the target. The model stays as it was.
result = bdfast.defenses.d3(model, (images[reserve], labels[reserve]), D3Config.for_digits(epochs=40))

# 4. What it changed.
triggered = poisoned.trigger(*test)
before = bdfast.metrics.evaluate(model, test, triggered)
after = bdfast.metrics.evaluate(result.model, test, triggered)
print("          ACC    ASR     RA")
for label, rates in (("before", before), ("after", after)):
    print(f"{label:<7}{rates.acc:6.1%} {rates.asr:6.1%} {rates.ra:6.1%}")
print(
    f"DER {bdfast.metrics.defense_effectiveness_rating(before, after):.1%}, {sum(result.timings.values()):.1f} seconds"
)
