"""What training returns, in a defense or by itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from torch import nn

from bdfast.runtime.plain_json import plain
from bdfast.runtime.progress import Record


@dataclass(frozen=True)
class TrainedResult:
    """A trained model and how it came about.

    Attributes:
        model: the network, on the device where it was trained, in the train/eval mode it came in.
        history: a record an epoch; see :func:`bdfast.training.loop.fit`.
        timings: seconds a stage (``setup``, ``train``).
    """

    model: nn.Module = field(repr=False)
    history: list[Record] = field(repr=False)
    timings: dict[str, float]

    def to_json(self) -> str:
        """Everything but the model, as one JSON object; numbers that are not finite become null.

        Example:
            >>> TrainedResult(nn.Linear(1, 1), [{"epoch": 1, "loss": float("nan")}], {"train": 0.5}).to_json()
            '{"history": [{"epoch": 1, "loss": null}], "timings": {"train": 0.5}}'
        """
        values = {name: value for name, value in vars(self).items() if name != "model"}
        return json.dumps(plain(values), allow_nan=False)
