"""What a poisoned image is to be classified as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bdfast.attacks.checks import check_integer
from bdfast.errors import LabelRangeError, message

Mode = Literal["all-to-one", "all-to-all"]


@dataclass(frozen=True)
class Relabel:
    """The attack label of every class: ``y' = target``, or ``y' = (y + 1) mod K``.

    Example:
        >>> Relabel(target=2)(torch.tensor([0, 1, 2]))
        tensor([2, 2, 2])
        >>> Relabel(mode="all-to-all", num_classes=3)(torch.tensor([0, 1, 2]))
        tensor([1, 2, 0])
    """

    mode: Mode = "all-to-one"  # [BB] both
    target: int = 0  # class index; all-to-one only; [BB] 0
    num_classes: int | None = None  # K; None: not stated, labels have no upper limit (all-to-one only)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            expected = f"one of {', '.join(get_args(Mode))}"
            raise ValueError(message("poison", "mode", expected, repr(self.mode), "choose one of them"))
        check_integer("poison", "target", self.target, 0, "pass a class index")
        if self.num_classes is not None:
            check_integer("poison", "num_classes", self.num_classes, 1, "pass the number of classes")
            if self.target >= self.num_classes:
                expected = f"a class below num_classes={self.num_classes}"
                raise LabelRangeError(message("poison", "target", expected, str(self.target), "pass a class index"))
        elif self.mode == "all-to-all":
            expected = "the number of classes for all-to-all"
            raise ValueError(message("poison", "num_classes", expected, "None", "pass it"))

    def __call__(
        self,
        labels: Tensor,  # [N] int64
    ) -> Tensor:
        """Attack labels [N] int64."""
        if self.mode == "all-to-one":
            return torch.full_like(labels, self.target)
        assert self.num_classes is not None  # checked in __post_init__
        return (labels + 1) % self.num_classes
