"""Options of AdvrBD, stage by stage, with where each default comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from bdfast.defenses.advrbd.content import Seeding
from bdfast.errors import message
from bdfast.runtime.plain_numbers import take_plain_numbers
from bdfast.runtime.precision import PRECISIONS, Precision
from bdfast.runtime.resident import Augment
from bdfast.training.options import AugmentName, check_count, check_flag, check_number, check_one_of

Rank: TypeAlias = Literal["kl", "confidence", "random", "oracle", "content"]

Vote: TypeAlias = Literal["last", "majority", "all"]

FROM_PRESET: Any = None  # a field's value before its preset is looked up
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "rank": "kl",
        "steps": 5,
        "step_size": 2 / 255,
        "patches": 1,
        "per_class": False,
        "content_check": False,
        "enhance_epochs": 4,
        "mu": 1.0,
        "vote": "last",
        "looks": 0,
    },
    "robust": {
        "rank": "content",
        "steps": 1,
        "step_size": 8 / 255,
        "patches": 8,
        "per_class": True,
        "content_check": True,
        "enhance_epochs": 2,
        "mu": 1.3,
        "vote": "all",
        "looks": 2,
    },
}


@dataclass(frozen=True)
class AdvrBDConfig:
    """Options of :func:`bdfast.defenses.advrbd`.

    [P] is the paper, of whose text all symbols, equations and algorithms are missing and which gives no numbers for its
    core loop: the procedure is reconstructed from its prose. [B] is BackdoorBench. [O] is ours. ``None`` in a field of
    :data:`PRESETS` stands for the preset's value and is replaced by it, so that a config always says what runs.

    Raises:
        TypeError, ValueError: a value of another kind or range than stated.

    Example:
        >>> AdvrBDConfig().rank, AdvrBDConfig(preset="robust").rank, AdvrBDConfig(preset="robust", rank="kl").rank
        ('kl', 'content', 'kl')
    """

    preset: Literal["paper", "robust"] = "paper"
    """"paper": the closest reading, whose first selection is not clean enough on small data. "robust" [O]: what
    measurably works there; it departs in the fields of :data:`PRESETS`, each with its reason. Fields given win."""

    # --- 1. warm-up --------------------------------------------------------------------------------------------------

    warm_up_epochs: int = 10
    """E0, epochs of ordinary training on the whole, poisoned set. 10 [O]."""

    warm_up_lr: float = 0.1
    """Learning rate there, annealed along a half cosine; also of the networks of rank="content". 0.1 [O]."""

    # --- 2. partition ------------------------------------------------------------------------------------------------

    rank: Rank = FROM_PRESET
    """What is presumed clean: samples of large KL score, "kl" [P]; of low "confidence"; "random" ones; truly clean ones
    at random, "oracle" (needs ground truth); or, "content" [O], those that rank high in their class by how much they
    belong there in the eyes of a network that never saw the class, see :mod:`bdfast.defenses.advrbd.content`, and by
    ``content_with``. KL and confidence alone rank WaNet's and TaCT's poison above clean samples of digits; content
    alone passes triggered images of the target class itself, three of which unlearned a BadNets trigger."""

    radius: int | None = None
    """r, pixels: half-width of the square patch, side 2r + 1. None: a quarter of the shorter side [O], 28 % of the
    pixels."""

    eps: float = 8 / 255
    """L_inf bound of the perturbation, in pixels of [0, 1]. 8/255 [O]; larger ones rank worse where a patch covers the
    trigger."""

    steps: int = FROM_PRESET
    """Gradient steps. 5 [O]; 1 in "robust", which ranked as well on small networks."""

    step_size: float = FROM_PRESET
    """Length of a step, in pixels of [0, 1]. 2/255 [O]; 8/255, all of eps, in "robust"."""

    attack: Literal["kl", "ce"] = "kl"
    """What the perturbation maximises: the score itself, "kl" [P], or the cross entropy of the given label, "ce"."""

    patches: int = FROM_PRESET
    """Patches a sample, of which the median score counts. 1 [P]; 8 in "robust" [O]: one patch in some four covers the
    trigger, and then the score says the contrary."""

    gamma: float = 0.05
    """Share of the set that each round adds to D_c, in (0, 1). 0.05 [O]; [P] ablates five values and finds little
    effect."""

    gamma_of: Literal["all", "remaining"] = "all"
    """... of the original set [O], or of what is left of it."""

    rounds: int = 5
    """T, rounds of partition and enhancement. 5 [O]; fewer where too few samples would remain."""

    per_class: bool = FROM_PRESET
    """Every class gives D_c the same share of its samples [O]; the ranking is over all of them [P]."""

    # --- rank="content" and content_check ----------------------------------------------------------------------------

    content_check: bool = FROM_PRESET
    """Nothing is clean in the end that looks like another class to a network that never saw its own [O]. No [P]. It
    rejects nothing where those networks recognise fewer than half of all samples: a warning says so."""

    content_with: Literal["confidence", "kl"] = "confidence"
    """What rank="content" weighs content against: the warm-up model's "confidence" (low is presumed clean), or its "kl"
    score [O]. The weight of content is the share of all samples that it recognises. What the rounds add to D_c is
    98.6 to 100 % clean on digits and, under BadNets, Blended and TaCT on 4,000 images of CIFAR-10, 97.1 to 100 %
    (benchmarks/results). Confidence takes one forward pass, a KL score a gradient a patch."""

    content_epochs: int = 10
    """Epochs that those networks are trained for [O]."""

    content_networks: int = 10
    """How many, at most: where there are more classes, a network leaves out several of them [O]."""

    content_seeds: float = 0.4
    """Share of a class that stands for it when its content is judged, in (0, 1] [O]."""

    content_seeding: Seeding = "both"
    """Which samples those are: of lowest "energy", with most of their own label among their nearest "neighbors", or
    high in "both" [O]. Neighbours keep poison out where a network knows little; energy finds seeds all over the class,
    which loses fewer clean samples."""

    content_shrinkage: float = 0.1
    """Of the features' covariance towards a multiple of the identity, in [0, 1] [O]."""

    # --- 3. enhancement of the backdoor ------------------------------------------------------------------------------

    enhance_epochs: int = FROM_PRESET
    """E1, epochs a round. 4 [O]; 2 in "robust"."""

    enhance_lr: float = 0.01
    """Learning rate, constant. 0.01 [O]."""

    mu: float = FROM_PRESET
    """Weight of the ascent on D_c, >= 0. 1 [O], 1.3 in "robust"; 0.1 leaves most clean samples suspected, 2 unlearns
    the trigger."""

    tau: float | None = None
    """Nats, > 0: cross entropy above which a sample of D_c does not count, which bounds the ascent. None: 2 ln K [O],
    a label's probability of K^-2."""

    # --- 4. identification -------------------------------------------------------------------------------------------

    vote: Vote = FROM_PRESET
    """Who has to misclassify what is clean: the "last" enhanced network [P], the "majority" or "all" [O] of the T
    networks that the rounds end with: how much of the backdoor one of them still shows varies from round to round.
    "all" leaves the fewest poisoned samples in D_clean, and the most clean ones for ``looks`` to bring back."""

    looks: int = FROM_PRESET
    """Contrasts of the suspects with D_clean, averaged [O]: what differs from it in nothing is clean after all, if
    content_check has nothing against it; see :mod:`bdfast.defenses.advrbd.contrast`. 0 [P]; 2 in "robust"."""

    look_epochs: int = 4
    """Epochs over D_clean of each of a look's two networks [O]; they should come to a few dozen steps at least."""

    look_lr: float = 0.03
    """Learning rate there, annealed along a half cosine [O]."""

    look_weight: float = 4.0
    """w, > 0: of D_clean against the suspects; more brings more of them back [O]."""

    keep_dc: bool = True
    """D_c is clean by construction [O]; otherwise its members have to be misclassified too, as [P] may mean."""

    min_per_class: int = 0
    """Samples a class that are kept as clean at least, those of largest score. 0 [P]."""

    # --- 5. clean model, 6. relabelling ------------------------------------------------------------------------------

    epochs: int = 100
    """Epochs of the clean model. 100 [B]."""

    lr: float = 0.01
    """Learning rate, annealed along a half cosine. 0.01 [B]."""

    relabel: bool = False
    """Also fine-tune a copy of the clean model on all samples, the suspected ones as it labels them itself [P]."""

    relabel_epochs: int = 20
    """Epochs. 20 [O]."""

    relabel_lr: float = 0.001
    """Learning rate, annealed along a half cosine. 0.001 [O]."""

    # --- all of them -------------------------------------------------------------------------------------------------

    batch_size: int = 128
    """Samples a step; an enhancement step takes as many of D_c as of D_u. 128 [B]."""

    momentum: float = 0.9
    """In [0, 1). 0.9 [B]."""

    weight_decay: float = 5e-4
    """L2 penalty on all parameters, >= 0. 5e-4 [B]."""

    augment: Augment | AugmentName = "auto"
    """In training; scores are of the plain images. See :class:`bdfast.training.TrainConfig`."""

    score_batch_size: int = 512
    """Images a pass where nothing is trained."""

    seed: int = 0
    """Seeds everything but the initial weights, which are the factory's."""

    precision: Precision = "fp32"
    """"bf16": forward and backward in bfloat16 (autocast), weights and scores in float32."""

    deterministic: bool = False
    """Same bits in every run on a GPU too, where it costs speed; the CPU always gives them."""

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        where = type(self).__name__
        check_one_of(where, "preset", self.preset, tuple(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is FROM_PRESET:
                object.__setattr__(self, name, value)
        self._check_partition(where)
        self._check_content(where)
        self._check_training(where)

    def _check_partition(self, where: str) -> None:
        check_one_of(where, "rank", self.rank, get_args(Rank))
        if self.radius is not None and not _is_count(self.radius):
            got, remedy = repr(self.radius), "pass None for a quarter of the side"
            raise ValueError(message(where, "radius", "a whole number of pixels, at least 0, or None", got, remedy))
        for name in ("eps", "step_size"):
            check_number(where, name, getattr(self, name), high=1.0, above=True)
        for name in ("steps", "patches", "rounds"):
            check_count(where, name, getattr(self, name))
        check_one_of(where, "attack", self.attack, ("kl", "ce"))
        check_number(where, "gamma", self.gamma, high=1.0, above=True)
        check_one_of(where, "gamma_of", self.gamma_of, ("all", "remaining"))
        check_flag(where, "per_class", self.per_class)

    def _check_content(self, where: str) -> None:
        check_flag(where, "content_check", self.content_check)
        for name in ("content_epochs", "content_networks"):
            check_count(where, name, getattr(self, name))
        check_one_of(where, "content_seeding", self.content_seeding, get_args(Seeding))
        for name in ("content_seeds", "content_shrinkage"):
            check_number(where, name, getattr(self, name), high=1.0 + 1e-9, above=name == "content_seeds")
        if self.content_networks < 2:
            got, remedy = str(self.content_networks), "the classes have to be left out in turn; pass 10, say"
            raise ValueError(message(where, "content_networks", "at least 2", got, remedy))

    def _check_training(self, where: str) -> None:
        for name in ("warm_up_epochs", "enhance_epochs", "look_epochs", "epochs", "relabel_epochs"):
            check_count(where, name, getattr(self, name))
        for name in ("batch_size", "score_batch_size"):
            check_count(where, name, getattr(self, name))
        for name in ("warm_up_lr", "enhance_lr", "look_lr", "look_weight", "lr", "relabel_lr"):
            check_number(where, name, getattr(self, name), above=True)
        check_number(where, "mu", self.mu)
        check_one_of(where, "vote", self.vote, get_args(Vote))
        check_number(where, "momentum", self.momentum, high=1.0)
        check_number(where, "weight_decay", self.weight_decay)
        if self.tau is not None:
            check_number(where, "tau", self.tau, above=True)
        for name in ("min_per_class", "looks"):
            if not _is_count(getattr(self, name)):
                got = repr(getattr(self, name))
                raise ValueError(message(where, name, "a whole number, at least 0", got, "pass 0 for none"))
        for name in ("keep_dc", "relabel", "deterministic"):
            check_flag(where, name, getattr(self, name))
        check_one_of(where, "precision", self.precision, PRECISIONS)
        if not isinstance(self.augment, Augment):
            check_one_of(where, "augment", self.augment, get_args(AugmentName))
        if not _is_count(self.seed) or self.seed >= 2**32:
            raise ValueError(message(where, "seed", "a whole number in [0, 2^32)", repr(self.seed), "pass 0, say"))

    @classmethod
    def for_digits(cls, **changes: Any) -> AdvrBDConfig:
        """20 epochs at lr 0.1 for the warm-up and the clean model, as the victims on scikit-learn's digits have, and 25
        for a look, since an epoch over a few hundred images is a few steps.

        Example:
            >>> AdvrBDConfig.for_digits(preset="robust", seed=3).epochs
            20
        """
        few = {"warm_up_epochs": 20, "look_epochs": 25, "epochs": 20, "lr": 0.1, "augment": "crop"}
        return cls(**{**few, **changes})


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
