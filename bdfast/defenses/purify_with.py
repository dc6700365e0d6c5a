"""One protocol for purifiers, and GIC in front of any of them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from bdfast.defenses.gic import GICResult, gic
from bdfast.defenses.gic.config import GICConfig
from bdfast.errors import message
from bdfast.files import check_path
from bdfast.runtime.progress import Callback, check_callback
from bdfast.training.results import TrainedResult
from bdfast.training.workspace import Normalization


class Purifier(Protocol):
    """A defense that trains a suspect model with clean data: :func:`d3`, :func:`fine_tune`, :func:`ft_sam`, or yours.

    A ``config`` of None stands for the purifier's own default, and is left out of the call.
    """

    def __call__(
        self,
        model: nn.Module,
        clean_data: object,
        *config: Any,
        callback: Callback | None,
        normalize: Normalization | None,
        device: str | torch.device | None,
        checkpoint: str | os.PathLike[str] | None,
    ) -> TrainedResult: ...


@dataclass(frozen=True)
class CalibratedPurification(TrainedResult):
    """What :func:`purify_with` returns: model, history and timings of the purifier, and both results.

    ``timings`` has the stages of the calibration as ``gic.<stage>``.
    """

    calibration: GICResult = field(repr=False)
    purification: TrainedResult = field(repr=False)

    def to_json(self) -> str:
        """The results of both, as one JSON object."""
        parts: dict[str, GICResult | TrainedResult] = {"gic": self.calibration, "purifier": self.purification}
        return json.dumps({name: json.loads(part.to_json()) for name, part in parts.items()}, allow_nan=False)


def purify_with(
    model: nn.Module,
    auxiliary_data: object,
    purifier: Purifier | Any,
    *,
    gic_config: GICConfig = GICConfig(),  # noqa: B008  (frozen)
    purifier_config: Any = None,
    callback: Callback | None = None,
    normalize: Normalization | None = None,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> CalibratedPurification:
    """Calibrate the auxiliary images for the victim (:func:`gic`), then purify the victim with them.

    Args:
        model: the victim; left alone.
        auxiliary_data: anything that :func:`bdfast.data.as_tensors` takes.
        purifier: see :class:`Purifier`.
        gic_config: see :class:`GICConfig`.
        purifier_config: the purifier's own; None is its default.
        callback, normalize, device: for both.
        checkpoint: the purifier's file; what GIC keeps lies in a folder beside it, named ``*.gic``.

    Returns:
        :class:`CalibratedPurification`.

    Raises:
        TypeError: a purifier that cannot be called. Whatever else GIC and the purifier raise.

    Example:
        >>> import bdfast
        >>> auxiliary_data, _, _ = bdfast.data.load("digits", limit=(60, 1))
        >>> model = bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1)
        >>> result = purify_with(model, auxiliary_data, bdfast.defenses.fine_tune, gic_config=GICConfig(steps=2),
        ...                      purifier_config=bdfast.defenses.FineTuneConfig(epochs=2))
        >>> len(result.history), sorted(result.timings)
        (2, ['gic.calibrate', 'gic.imprint', 'setup', 'train'])
    """
    if not callable(purifier):
        got, remedy = type(purifier).__name__, "pass bdfast.defenses.d3, say"
        raise TypeError(message("purify_with", "purifier", "a function (model, data, config)", got, remedy))
    check_callback("purify_with", callback)
    check_path("purify_with", "checkpoint", checkpoint)
    folder = None if checkpoint is None else Path(checkpoint).with_suffix(".gic")
    shared: dict[str, Any] = {"callback": callback, "normalize": normalize, "device": device}
    calibration = gic(model, auxiliary_data, gic_config, **shared, checkpoint=folder)
    config = () if purifier_config is None else (purifier_config,)
    result = purifier(model, calibration.data, *config, **shared, checkpoint=checkpoint)
    timings = {**{f"gic.{name}": seconds for name, seconds in calibration.timings.items()}, **result.timings}
    return CalibratedPurification(result.model, result.history, timings, calibration, result)
