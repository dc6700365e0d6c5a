"""Open an attack's record that somebody sent you, without running anything in it, and purify its model.

    python examples/suspicious_record.py

A record in BackdoorBench's layout is made first, as your correspondent would: a victim, its poisoned training set, its
triggered test set. Prints what the files claim, the rates before and after PAD-FT, and what became of a file with a
payload.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

import bdfast
from bdfast.defenses import PadFTConfig
from bdfast.integrations import backdoorbench as bb
from bdfast.training import TrainConfig

train, test, _ = bdfast.data.load("digits")


class Payload:
    """What unpickling runs."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo the payload ran",)


def make_record(folder: Path) -> None:
    """What you are sent."""
    poisoned = bdfast.attacks.poison(*train, "badnets", rate=0.1, target=0, seed=0)
    victim = bdfast.models.build(
        "digits_cnn", num_classes=10, image_size=8, channels=1, normalize=bdfast.data.normalization("digits"), seed=0
    )
    bdfast.training.train_classifier(victim, poisoned, TrainConfig.for_digits(epochs=12))
    bb.save_record(
        folder, victim, model_name="digits_cnn", num_classes=10, clean_data="digits", train=poisoned,
        test=poisoned.trigger(*test),
    )  # fmt: skip


def main() -> None:
    """Look, open, purify, leave the result where BackdoorBench's scripts look for it."""
    torch.set_num_threads(1)  # 8x8 images keep one thread busy at best
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "record" / "badnet_0_1"
        make_record(folder)

        # 1. The files are interpreted in a process of their own, which has neither torch nor anything to call.
        record = bb.load_record(folder, train=train, test=test)
        print(
            f"{record.model_name}: {int(record.train.is_poisoned.sum())} of {len(record.train.labels)} images poisoned"
        )

        # 2. PAD-FT needs the poisoned training set alone.
        result = bdfast.defenses.pad_ft(record.model, record.train, PadFTConfig.for_digits(preset="robust"))
        for name, model in (("before", record.model), ("after", result.model)):
            rates = bdfast.metrics.evaluate(model, record.clean_test, record.triggered_test)
            print(f"{name:<7} ACC {rates.acc:.1%}  ASR {rates.asr:.1%}")

        # 3. defense_result.pt and the metrics' files, for its scripts. The bounds go beside the weights.
        bb.write_defense_result(folder, "pad_ft", result.model, model_name="digits_cnn", num_classes=10)
        print(f"left in {(folder / 'defense' / 'pad_ft').relative_to(place)}")

        # 4. A file whose unpickling runs a command is refused, and nothing ran.
        bad = Path(place) / "attack_result.pt"
        torch.save({"model": Payload()}, bad)
        try:
            bb.read_artefact(bad, where="example")
        except bb.ArtefactError as error:
            print(f"refused: {error.kind}")


if __name__ == "__main__":
    main()
