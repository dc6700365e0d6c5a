"""Channel means and standard deviations in the [0, 1] scale, as BackdoorBench users train with them."""

from __future__ import annotations

from typing import NamedTuple

from bdfast.errors import message


class Normalization(NamedTuple):
    """``(x - mean) / std`` per channel, for x in [0, 1]; unpacks as ``mean, std``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


NORMALIZATIONS = {
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny": Normalization((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "gtsrb": Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # trained without normalization
    "celeba": Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # likewise
    "mnist": Normalization((0.5,), (0.5,)),
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": Normalization((0.3053,), (0.3759,)),  # of all 1,797 images after scaling to 0..255
}

ALIASES = {"tinyimagenet": "tiny", "tinyimagenet200": "tiny"}  # BackdoorBench says tiny, everybody else one of these


def normalization(name: str) -> Normalization:
    """``(mean, std)`` of a data set: ``cifar10``, ``cifar100``, ``tiny`` (or ``tiny_imagenet``, ``tiny-imagenet-200``),
    ``gtsrb``, ``celeba``, ``mnist``, ``imagenet`` or ``digits``; case, ``-`` and ``_`` do not matter.

    Raises:
        ValueError: another name.

    Example:
        >>> mean, std = normalization("CIFAR-10")
        >>> mean
        (0.4914, 0.4822, 0.4465)
    """
    plain = str(name).lower().replace("-", "").replace("_", "")
    found = NORMALIZATIONS.get(ALIASES.get(plain, plain))
    if found is None:
        expected = f"one of {sorted(NORMALIZATIONS)}"
        raise ValueError(message("normalization", "name", expected, repr(name), "pass mean and std yourself"))
    return found
