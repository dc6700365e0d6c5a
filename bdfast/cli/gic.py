"""``bdfast defend gic`` and ``gic+<purifier>``: calibrated sets by themselves, or in front of a purifier."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor, nn

from bdfast.attacks import PoisonedData
from bdfast.data import save_calibrated
from bdfast.defenses import CalibratedPurification, GICConfig, GICResult, gic, purify_with
from bdfast.report import Curves, Panel

PREFIX = "gic_"  # of GIC's settings where a purifier has settings of its own
SHARED = ("seed", "deterministic")  # one setting for both, where the purifier has it

TrainingSet = PoisonedData | tuple[Tensor, Tensor]


def calibrate(
    model: nn.Module, auxiliary: object, config: GICConfig, *, checkpoint: str | os.PathLike[str], **options: Any
) -> GICResult:
    """GIC alone; it keeps its work in a folder beside ``checkpoint``, which the command removes once it has results."""
    return gic(model, auxiliary, config, checkpoint=Path(checkpoint).with_suffix(".gic"), **options)


def behind_gic(purifier: Callable[..., Any]) -> Callable[..., CalibratedPurification]:
    """A purifier, as the command calls one, that is given a calibrated set."""

    def purify(
        model: nn.Module, auxiliary: object, config: Any, *, checkpoint: str | os.PathLike[str], **options: Any
    ) -> CalibratedPurification:
        return purify_with(
            model, auxiliary, purifier,
            gic_config=config.gic, purifier_config=config.purifier, checkpoint=checkpoint, **options,
        )  # fmt: skip

    return purify


def joined_config(config: type) -> type:
    """A flat config of a purifier's fields and GIC's, which get a prefix; ``gic`` and ``purifier`` are its two parts.

    Example:
        >>> from bdfast.defenses import FineTuneConfig
        >>> both = joined_config(FineTuneConfig)(epochs=3, gic_delta=0.5, seed=7)
        >>> both.purifier.epochs, both.gic.delta, both.gic.seed, both.purifier.seed
        (3, 0.5, 7, 7)
    """
    hints, ours = get_type_hints(config), get_type_hints(GICConfig)
    members: list[tuple[str, Any, Field[Any]]] = [
        (f.name, hints[f.name], field(default=f.default)) for f in fields(config)
    ]
    shared = [name for name in SHARED if name in hints]
    own = [f for f in fields(GICConfig) if f.name not in shared]
    members += [(PREFIX + f.name, ours[f.name], field(default=f.default)) for f in own]

    def gic_part(self: Any) -> GICConfig:
        return GICConfig(
            **{f.name: getattr(self, PREFIX + f.name) for f in own}, **{name: getattr(self, name) for name in shared}
        )

    def purifier_part(self: Any) -> Any:
        return config(**{f.name: getattr(self, f.name) for f in fields(config)})

    def check(self: Any) -> None:
        for prefix, part in ((PREFIX, gic_part(self)), ("", purifier_part(self))):  # as they run, presets resolved
            for name in (f.name for f in fields(part) if not prefix or f.name not in shared):
                object.__setattr__(self, prefix + name, getattr(part, name))

    body: dict[str, Any] = {
        "__post_init__": check,
        "gic": property(gic_part),
        "purifier": property(purifier_part),
        "__doc__": f"Settings of GIC, with the prefix {PREFIX}, and of {config.__name__}.",
    }
    small = _fields(config.for_digits()) if hasattr(config, "for_digits") else {}
    small.update({PREFIX + f.name: getattr(GICConfig.for_digits(), f.name) for f in own})
    body["for_digits"] = classmethod(lambda cls, **changes: cls(**{**small, **changes}))
    return make_dataclass(f"GIC{config.__name__}", members, frozen=True, namespace=body)


def _fields(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config)}


def save(folder: Path, result: GICResult) -> None:
    """The calibrated set, float32, in the layout that BackdoorBenchER reads."""
    about = {"config": asdict(result.config), "counts": result.counts, "drifted": result.imprint.drifted}
    save_calibrated(folder, *result.data, result.ids, about)


def describe(result: GICResult) -> str:
    """What calibration did, in a few lines."""
    imprint, counts = result.imprint, result.counts
    drift = (
        f"classes {imprint.drifted} attract images of others" if imprint.drifted else "no class attracts more images"
    )
    return "\n".join(
        [
            f"{counts['images']} images calibrated, {counts['mixed']} originals added; "
            f"{counts['unchanged']} unchanged, {counts['nonfinite']} with a loss that is not finite, "
            f"{counts['early']} stopped early",
            f"the victim's loss on them: {imprint.loss[0]:.4f} before, {imprint.loss[1]:.4f} after; "
            f"its accuracy: {100 * imprint.accuracy[0]:.1f} and {100 * imprint.accuracy[1]:.1f} %",
            f"imprint: {drift} (largest rise {100 * imprint.drift:.2f} points)",
        ]
    )


def panels(
    result: GICResult | CalibratedPurification, training_set: TrainingSet, class_names: Sequence[str]
) -> Sequence[Panel]:
    """The imprint check, class by class."""
    imprint = (result if isinstance(result, GICResult) else result.calibration).imprint
    columns = {"before": imprint.before, "calibrated": imprint.after, "with another's perturbation": imprint.transfer}
    lines = {name: (list(range(len(rates))), [100 * rate for rate in rates]) for name, rates in columns.items()}
    return [Curves("Images of other classes taken for a class", "class", "percent", lines)]
