"""Options of PAD-FT, step by step, with where each default comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from bdfast.errors import message
from bdfast.runtime.plain_numbers import take_plain_numbers
from bdfast.runtime.precision import PRECISIONS, Precision
from bdfast.training.options import check_count, check_flag, check_number, check_one_of

Sites: TypeAlias = Literal["stage-relu", "all-relu"] | Sequence[str]

FROM_PRESET: Any = None  # a field's value before its preset is looked up
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "split": "none",
        "sites": "stage-relu",
        "init": "observed",
        "lam": 0.5,
        "lam_factor": 1.2,
        "lam_start": 10,
        "lam_every": 10,
        "target_accuracy": 95.0,
        "keep": "last",
        "suspect_weight": 0.0,
        "lr": 0.01,
        "batch_size": 256,
    },
    "robust": {
        "split": "spread",
        "sites": "all-relu",
        "init": "channel",
        "lam": 0.002,
        "lam_factor": 1.05,
        "lam_start": -1,
        "lam_every": 1,
        "target_accuracy": 99.0,
        "keep": "best",
        "suspect_weight": 2.0,
        "lr": 0.1,
        "batch_size": 64,
    },
}


@dataclass(frozen=True)
class PadFTConfig:
    """Options of :func:`bdfast.defenses.pad_ft`.

    [P] is the paper, whose equations 1 to 4 and several weights had to be reconstructed from its prose and from what it
    cites: [S] SCE (Wang et al., ICCV 2019), [M] MM-BD (Wang et al., S&P 2024) with its code, [T] Sajjadi et al.
    (NeurIPS 2016), [B] BackdoorBench. [O] is ours. ``None`` in a field of :data:`PRESETS` stands for the preset's value
    and is replaced by it, so that a config always says what runs.

    Raises:
        TypeError, ValueError: a value of another kind or range than stated.

    Example:
        >>> PadFTConfig().lam, PadFTConfig(preset="robust").lam, PadFTConfig(preset="robust", lam=1).lam
        (0.5, 0.002, 1)
    """

    preset: Literal["paper", "robust"] = "paper"
    """"paper": the closest reading, under which the target class of the selected set is mostly poisoned on small data.
    "robust" [O]: looks for a class of two modes first, and uses what it finds; see ``split``. Fields given win."""

    # --- 1. purification ---------------------------------------------------------------------------------------------

    k: int = 300
    """Samples a class to select. 300 on CIFAR-10, 30 on CIFAR-100 [P Table III]; a smaller class gives all it has."""

    trim: float = 0.0
    """t in [0, 1): share of every class, lowest loss first, that is passed over. 0 [P]; not 0 [O]."""

    split: Literal["none", "spread"] = FROM_PRESET
    """"spread" [O]: a class whose features scatter too widely is split in two modes, and only one is selected from; the
    other holds the suspects. See :mod:`bdfast.defenses.pad_ft.selection`. "none" [P]."""

    spread_ratio: float = 1.45
    """r >= 1, with split="spread": variance of a class's features, in units of the median class, from which it may be
    split [O]. Target classes had 1.5 to 3.4 on digits and CIFAR-10, others up to 1.4."""

    margin_gap: float = 1.3
    """... and how far the mean margins of its two modes must be apart, in units of the median class's standard
    deviation of margins, >= 0 [O]. Target classes had 1.4 to 7.2; the digit 1, written in two styles, 0.2 to 1.4."""

    clear_gap: float = 2.5
    """... from which the gap alone decides, >= 0 [O]. The second classes of strong blends are all alike (0.43 at a gap
    of 5.2 on CIFAR-10); no clean class had a gap above 2."""

    diversity: float = 0.45
    """... and how various the second classes of the suspects must be below that: entropy in units of log(K - 1), in
    [0, 1) [O]."""

    # --- 2. activation clipping --------------------------------------------------------------------------------------

    sites: Sites = FROM_PRESET
    """Which ReLUs get bounds: "stage-relu", three of them, as in [M] (in other networks three as far in, with a warning
    [O]); "all-relu" [O]; or names of modules."""

    init: float | Literal["observed", "channel"] = FROM_PRESET
    """z at the start: "observed", the site's largest activation on the selected set in all of its channels, so that
    clipping starts as a no-op, as [P]'s "very large" asks; "channel" [O], the largest of each channel; or a number, 8.0
    in [M], at most 1000 times the observed one."""

    lam: float = FROM_PRESET
    """lambda at the start, >= 0: weight of sum_l ||z_l||_2 against squared logits. 0.5 [M]; 0.002 in "robust" [O]."""

    lam_factor: float = FROM_PRESET
    """> 1: what lambda is multiplied with where accuracy allows, and divided by where not. 1.2 [M]; 1.05 in
    "robust" [O]."""

    lam_start: int = FROM_PRESET
    """lambda changes in epochs e > lam_start (e from 0), ... 10 [M]; -1 in "robust" [O]."""

    lam_every: int = FROM_PRESET
    """... where e is a multiple of this. 10 [M], hence at e = 20, 30, 40; 1 in "robust" [O]."""

    target_accuracy: float = FROM_PRESET
    """Percent of the selected samples that are to stay correct under clipping. 95 [M]; 99 in "robust" [O]."""

    keep: Literal["last", "best"] = FROM_PRESET
    """Bounds that count: those of the "last" epoch [M], or the "best" [O]: lowest objective without the squared error
    among the ends of epochs (and the start) where the target accuracy holds, so that a collapse is not kept."""

    suspect_weight: float = FROM_PRESET
    """gamma >= 0: weight of -log(1 - p_y), the mean over suspects, in steps 2 and 3. 0 [P]; 2 in "robust" [O]."""

    clip_lr: float = 0.1
    """Learning rate of Adam on the bounds, in units of activations a step. 0.1 [M]."""

    clip_epochs: int = 50
    """Passes over the selected set in step 2. 50 [M]; 0 leaves the bounds where they start, a no-op by default."""

    clip_batch_size: int = 200
    """Samples a step in step 2. 200 [M]."""

    # --- 3. fine-tuning of the last linear layer ---------------------------------------------------------------------

    a: float = 1.0
    """Weight of cross entropy in SCE, >= 0: 0.1 on CIFAR-10, 6 on CIFAR-100, else 1 [S, its code]; [P] has none."""

    b: float = 1.0
    """Weight of reverse cross entropy in SCE, >= 0: 1 on CIFAR-10, 0.1 on CIFAR-100, else 1 [S, its code]. [P]'s alpha
    is b with a = 1."""

    log_zero: float = -4.0
    """A < 0, what stands for log 0 in reverse cross entropy: -4 [S]; its code amounts to -9.2103."""

    clamp: float | None = None
    """Floor of the probabilities in reverse cross entropy; None is none, 1e-7 is [S]'s code."""

    beta: float = 1.0
    """beta >= 0: weight of the consistency of an image and its augmentation. Not published; 1 [O]."""

    epochs: int = 20
    """Passes over the selected set in step 3. 20 [O]."""

    batch_size: int = FROM_PRESET
    """Samples a step in step 3; the last, smaller batch counts too. 256 [B]; 64 in "robust" [O]."""

    lr: float = FROM_PRESET
    """eta > 0, annealed to 0 along a half cosine, one step an epoch. 0.01 [B]; 0.1 in "robust" [O]."""

    momentum: float = 0.9
    """In [0, 1). 0.9 [B]."""

    weight_decay: float = 5e-4
    """L2 penalty on the last layer, >= 0. 5e-4 [B]."""

    flip: bool | Literal["auto"] = "auto"
    """Whether aug() mirrors with probability 1/2 [P]; "auto": colour images only, since grayscale ones are digits and
    characters [O]."""

    brightness: float = 0.2
    """aug() multiplies pixels with U(1 - s, 1 + s), s in [0, 1). [P] names the operation; 0.2 [O]."""

    contrast: float = 0.2
    """aug() multiplies distances to the mean grey level with U(1 - s, 1 + s), s in [0, 1). Likewise 0.2 [O]."""

    draws: int | None = None
    """R augmentations a sample that the epochs take in turn; None draws anew in every epoch."""

    cache_features: bool = False
    """Keep the frozen features of R augmentations instead of computing those of an epoch anew: the same result, and an
    epoch is a linear problem. Sets draws to 10 where it is None [O]."""

    # --- how it runs -------------------------------------------------------------------------------------------------

    score_batch_size: int = 512
    """Images a forward pass where nothing is trained."""

    split_dims: int = 64
    """Features a sample that are kept for the split; wider ones are projected at random to so many (Johnson and
    Lindenstrauss), which keeps memory at 4 * split_dims bytes a sample."""

    precision: Precision = "fp32"
    """Of the network in steps 2 and 3: "bf16" runs convolutions in bfloat16, with bounds, losses and the last layer in
    float32. Step 1 is float32 always: its margins decide who is trusted."""

    seed: int = 0
    """Seeds order, augmentation and projection."""

    deterministic: bool = False
    """Same bits in every run on a GPU too, where it costs speed; the CPU always gives them."""

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        where = type(self).__name__
        check_one_of(where, "preset", self.preset, tuple(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is FROM_PRESET:
                object.__setattr__(self, name, value)
        if self.cache_features is True and self.draws is None:
            object.__setattr__(self, "draws", 10)
        self._check_selection(where)
        self._check_clipping(where)
        self._check_tuning(where)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(message(where, "seed", "a whole number in [0, 2^32)", repr(self.seed), "pass 0, say"))
        check_one_of(where, "precision", self.precision, PRECISIONS)
        check_flag(where, "deterministic", self.deterministic)

    def _check_selection(self, where: str) -> None:
        for name in ("k", "score_batch_size", "split_dims"):
            check_count(where, name, getattr(self, name))
        check_number(where, "trim", self.trim, high=1.0)
        check_one_of(where, "split", self.split, ("none", "spread"))
        check_number(where, "spread_ratio", self.spread_ratio, low=1.0)
        check_number(where, "margin_gap", self.margin_gap)
        check_number(where, "clear_gap", self.clear_gap)
        check_number(where, "diversity", self.diversity, high=1.0)

    def _check_clipping(self, where: str) -> None:
        if self.sites not in ("stage-relu", "all-relu"):
            object.__setattr__(self, "sites", _check_names(where, self.sites))
        if self.init not in ("observed", "channel"):
            check_number(where, "init", self.init, above=True)
        check_number(where, "lam", self.lam)
        check_number(where, "lam_factor", self.lam_factor, low=1.0, above=True)
        if isinstance(self.lam_start, bool) or not isinstance(self.lam_start, int):
            got = repr(self.lam_start)
            raise TypeError(message(where, "lam_start", "a whole number of epochs", got, "pass 10, or -1 for all"))
        for name in ("lam_every", "clip_batch_size"):
            check_count(where, name, getattr(self, name))
        if self.clip_epochs != 0:
            check_count(where, "clip_epochs", self.clip_epochs)
        check_number(where, "target_accuracy", self.target_accuracy, high=100.0 + 1e-9)
        check_one_of(where, "keep", self.keep, ("last", "best"))
        check_number(where, "suspect_weight", self.suspect_weight)
        check_number(where, "clip_lr", self.clip_lr, above=True)

    def _check_tuning(self, where: str) -> None:
        for name in ("a", "b", "beta", "weight_decay"):
            check_number(where, name, getattr(self, name))
        if isinstance(self.log_zero, bool) or not isinstance(self.log_zero, (int, float)) or not self.log_zero < 0:
            raise ValueError(message(where, "log_zero", "a number < 0", repr(self.log_zero), "pass -4"))
        if self.clamp is not None:
            check_number(where, "clamp", self.clamp, high=1.0, above=True)
        for name in ("epochs", "batch_size"):
            check_count(where, name, getattr(self, name))
        check_number(where, "lr", self.lr, above=True)
        for name in ("momentum", "brightness", "contrast"):
            check_number(where, name, getattr(self, name), high=1.0)
        if self.flip != "auto":
            check_flag(where, "flip", self.flip)
        check_flag(where, "cache_features", self.cache_features)
        if self.draws is not None:
            check_count(where, "draws", self.draws)

    @classmethod
    def for_cifar10(cls, **changes: Any) -> PadFTConfig:
        """The weights of SCE for CIFAR-10 [S].

        Example:
            >>> PadFTConfig.for_cifar10(preset="robust").a
            0.1
        """
        return cls(**{"a": 0.1, "b": 1.0, **changes})

    @classmethod
    def for_cifar100(cls, **changes: Any) -> PadFTConfig:
        """The weights of SCE [S] and the k [P] for CIFAR-100."""
        return cls(**{"a": 6.0, "b": 0.1, "k": 30, **changes})

    @classmethod
    def for_digits(cls, **changes: Any) -> PadFTConfig:
        """k = 100 of the 140 samples a class that scikit-learn's digits have, in batches of 100.

        Example:
            >>> PadFTConfig.for_digits(seed=3).k
            100
        """
        return cls(**{"k": 100, "clip_batch_size": 100, **changes})


def _check_names(where: str, sites: object) -> tuple[str, ...]:
    if isinstance(sites, (list, tuple)) and sites and all(isinstance(name, str) for name in sites):
        return tuple(dict.fromkeys(sites))
    expected = '"stage-relu", "all-relu", or a list of module names'
    raise ValueError(message(where, "sites", expected, repr(sites), 'pass ["relu1"], say'))
