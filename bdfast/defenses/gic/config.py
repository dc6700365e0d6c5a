"""Options of GIC, with where each default comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from bdfast.errors import message
from bdfast.runtime.plain_numbers import take_plain_numbers
from bdfast.runtime.precision import PRECISIONS, Precision
from bdfast.training.options import check_count, check_flag, check_number, check_one_of

Mode: TypeAlias = Literal["sample", "prompt", "network"]
Norm: TypeAlias = Literal["inf"] | float
LabelSource: TypeAlias = Literal["given", "pseudo"]

NETWORK_LR = 1e-3  # Adam's customary step, for a network of 20,000 weights


@dataclass(frozen=True)
class GICConfig:
    """Options of :func:`bdfast.defenses.gic`.

    [P] is the abstract of the paper and what others say of it, [M] what we infer from that and from the data code that
    its authors published, [O] ours. No table of the paper's settings was to be had: every number here is [O].

    Raises:
        TypeError, ValueError: a value of another kind or range than stated.

    Example:
        >>> GICConfig().step, GICConfig(delta=0.5, p=2).p
        (0.00392156862745098, 2.0)
    """

    mode: Mode = "sample"
    """The kind of g: "sample", x + d_i with a d of its own for every image [O]; "prompt", x + d with one for all [M];
    "network", x + delta tanh(h(x)) with a small convolutional network h [M]. See
    :mod:`bdfast.defenses.gic.calibrators`."""

    p: Norm = "inf"
    """The norm that bounds g(x) - x: "inf" or 2, in pixels of [0, 1]. The bound is [P], its norm [O]. "network" takes
    "inf" only."""

    delta: float = 8 / 255
    """delta > 0: the bound on ||g(x) - x||_p of every image [P]. 8/255 with "inf"; try 4/255 and 16/255. With p = 2 it
    is to be larger: 0.5 to 2 at 32 x 32."""

    steps: int = 20
    """S, with "sample": steps of descent."""

    step_size: float | None = None
    """a > 0, with "sample": length of a step, in the norm p. None is delta / 8."""

    epochs: int = 20
    """With "prompt" and "network": passes over the auxiliary set."""

    lr: float | None = None
    """With "prompt": length of a step, > 0; None is delta / 10. With "network": Adam's learning rate; None is 0.001."""

    momentum: float = 0.9
    """With "prompt": in [0, 1), of the gradient whose sign (or direction, p = 2) is the step."""

    per_class: bool = False
    """With "prompt": a d for every class."""

    batch_size: int = 256
    """Images at once."""

    w_bn: float = 0.0
    """w_bn >= 0: weight of R_bn, the distance of each batch norm's input statistics from the running ones, the only
    other trace of the training data in the victim. A batch is then calibrated as a whole. 1 did better than 0 with
    every purifier on digits (benchmarks/results/gic_families): try it."""

    labels: LabelSource = "given"
    """The classes that images are calibrated for: those "given", or "pseudo", what the victim takes each image for;
    these are then the labels of the result too, and the given ones are not looked at."""

    conf: float | None = None
    """With "sample": an image stops once the victim gives its class a probability of conf or more, in (0, 1]. None: no
    image stops early."""

    mix: float = 0.0
    """Originals that are added to the calibrated set, as a share of it in [0, 1]; 0 replaces them."""

    drift: float = 0.01
    """Tolerance of the imprint check: by how much the rate at which images of other classes are taken for one class may
    rise. See :mod:`bdfast.defenses.gic.imprint`."""

    seed: int = 0
    """Seeds the order of batches, the network's first weights, and which originals are mixed in. "sample" draws
    nothing."""

    precision: Precision = "fp32"
    """"bf16": the victim runs in bfloat16, losses and images stay in float32. The sign of a gradient is fragile:
    compare the results."""

    deterministic: bool = False
    """Same bits in every run on a GPU too, where it costs speed; the CPU always gives them."""

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        where = "GICConfig"
        check_one_of(where, "mode", self.mode, get_args(Mode))
        object.__setattr__(self, "p", _norm(self.p))
        if self.mode == "network" and self.p != "inf":
            raise ValueError(message(where, "p", '"inf" with mode="network"', repr(self.p), "take another mode"))
        check_number(where, "delta", self.delta, above=True)
        for name in ("step_size", "lr"):
            if getattr(self, name) is not None:
                check_number(where, name, getattr(self, name), above=True)
        for name in ("steps", "epochs", "batch_size"):
            check_count(where, name, getattr(self, name))
        check_number(where, "momentum", self.momentum, high=1.0)
        for name in ("per_class", "deterministic"):
            check_flag(where, name, getattr(self, name))
        check_number(where, "w_bn", self.w_bn)
        check_one_of(where, "labels", self.labels, get_args(LabelSource))
        if self.conf is not None:
            check_number(where, "conf", self.conf, high=math.nextafter(1.0, 2.0), above=True)
        check_number(where, "mix", self.mix, high=math.nextafter(1.0, 2.0))
        check_number(where, "drift", self.drift, high=1.0)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(message(where, "seed", "a whole number in [0, 2^32)", repr(self.seed), "pass 0, say"))
        check_one_of(where, "precision", self.precision, PRECISIONS)

    @classmethod
    def for_digits(cls, **changes: Any) -> GICConfig:
        """w_bn = 1, for small digits.

        Example:
            >>> GICConfig.for_digits(seed=1).w_bn
            1.0
        """
        return cls(**{"w_bn": 1.0, **changes})

    @property
    def step(self) -> float:
        """a, as a number."""
        return self.delta / 8 if self.step_size is None else self.step_size

    @property
    def learning_rate(self) -> float:
        """lr, as a number."""
        if self.lr is not None:
            return self.lr
        return NETWORK_LR if self.mode == "network" else self.delta / 10


def _norm(p: Any) -> Norm:
    if p in ("inf", math.inf):
        return "inf"
    if p == 2 and isinstance(p, (int, float)) and not isinstance(p, bool):
        return 2.0
    raise ValueError(message("GICConfig", "p", '"inf" or 2', repr(p), "choose one of them"))
