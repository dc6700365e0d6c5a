r"""The transformations g of GIC: an image's own step, a prompt for all, a small network.

==============================  ===================================  ===============================================
class                           g(x), clipped to [0, 1]              how it is found
==============================  ===================================  ===============================================
:class:`SampleCalibrator`       :math:`x + d_i`                      S projected steps of descent for every image
:class:`PromptCalibrator`       :math:`x + d`, or :math:`x + d_y`    signed momentum steps over batches, projected
:class:`NetworkCalibrator`      :math:`x + \delta \tanh(h(x))`       Adam on four convolutions, the last one zero
==============================  ===================================  ===============================================

All of them start as the identity and keep :math:`\lVert g(x) - x \rVert_p \le \delta`. Their interface is one,
``calibrator(config).fit(model, data).transform(images, labels)``. Where g is unrestricted, the problem separates into
one for each image, and "sample" solves it without an architecture to guess; this is our reading, see
:mod:`bdfast.defenses.gic.algorithm`.
"""

from __future__ import annotations

from collections.abc import Callable

from bdfast.defenses.gic.base import Calibrator
from bdfast.defenses.gic.config import GICConfig, Mode
from bdfast.defenses.gic.learned import NetworkCalibrator, PromptCalibrator
from bdfast.defenses.gic.sample import SampleCalibrator

CALIBRATORS: dict[Mode, Callable[[GICConfig], Calibrator]] = {
    "sample": SampleCalibrator,
    "prompt": PromptCalibrator,
    "network": NetworkCalibrator,
}


def calibrator(config: GICConfig = GICConfig()) -> Calibrator:  # noqa: B008  (frozen)
    """The calibrator of a config's ``mode``.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> images, labels = torch.full((3, 1, 2, 2), 0.5), torch.tensor([0, 1, 1])
        >>> made = calibrator(GICConfig(delta=0.25, steps=4)).fit(model, (images, labels)).transform(images, labels)
        >>> made.images.shape, bool(((made.images - images).abs() <= 0.25).all())
        (torch.Size([3, 1, 2, 2]), True)
    """
    return CALIBRATORS[config.mode](config)
