r"""ABL (Li et al., NeurIPS 2021, arXiv 2110.11571): the ranking that isolates the poison, and its two training losses.

The isolation stage ranks every training sample by its cross entropy under the pre-trained model and keeps the first
``int(N * ratio)``: poisoned samples are learned first, so their loss is lowest. The usual loop passes one image at a
time and waits for each loss. Here batches go through a copy of the network with its batch norms folded
(:class:`bdfast.runtime.FrozenModel`), losses stay on the device until the end, and the order is a stable sort.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bdfast.errors import message
from bdfast.integrations.backdoorbench.accelerated.switch import switchable
from bdfast.ops import hinge_cross_entropy
from bdfast.runtime import FrozenModel

BATCH = 64  # PreAct-ResNet18 on two cores: larger batches leave the cache and gain nothing; a GPU is full from here on
GPU_BATCH = 512

_LOG = logging.getLogger(__name__)

# --- ranking ---------------------------------------------------------------------------------------------------------


def plain_compute_loss_value(
    args: Any,
    poisoned_data: Dataset[Any],
    model_ascent: nn.Module,
) -> NDArray[np.int64]:
    """The usual loop: one image a forward pass, one wait a loss."""
    criterion = nn.CrossEntropyLoss()
    model_ascent.eval()
    losses = []
    for image, target, *_ in DataLoader(poisoned_data, batch_size=1, shuffle=False):
        with torch.no_grad():
            losses.append(criterion(model_ascent(image.to(args.device)), target.to(args.device)).item())
    return _ranking(np.array(losses))


@switchable(plain_compute_loss_value)
def compute_loss_value(
    args: Any,
    poisoned_data: Dataset[Any],
    model_ascent: nn.Module,
) -> NDArray[np.int64]:
    """Positions of all samples by ascending cross entropy: ABL's isolation order.

    Same order as one image at a time, but for samples whose losses differ by less than the rounding of convolutions
    over another batch size and of folded batch norms. Equal losses keep the order of the data set; NaN comes last.

    Args:
        args: has ``device``.
        poisoned_data: yields ``(image, label, ...)``; images alike in shape.
        model_ascent: on that device; left in eval mode, as the usual loop leaves it.

    Returns:
        ``[N]`` int64.

    Raises:
        ValueError: the data set is empty.

    Example:
        >>> from types import SimpleNamespace
        >>> images, labels = torch.eye(3)[:, :, None, None], torch.tensor([1, 1, 1])
        >>> data = torch.utils.data.TensorDataset(images, labels)
        >>> compute_loss_value(SimpleNamespace(device="cpu"), data, nn.Flatten())
        array([1, 0, 2])
    """
    model_ascent.eval()
    device = torch.device(args.device)
    batch = BATCH if device.type == "cpu" else GPU_BATCH
    losses = []
    with FrozenModel(model_ascent, device=device, where="compute_loss_value") as frozen, torch.no_grad():
        for images, target, *_ in DataLoader(poisoned_data, batch_size=batch, shuffle=False):
            losses.append(F.cross_entropy(frozen.logits(images.to(device)), target.to(device), reduction="none"))
    if not losses:
        where = "compute_loss_value"
        raise ValueError(message(where, "poisoned_data", "at least one sample", "none", "pass the poisoned set"))
    return _ranking(torch.cat(losses).cpu().numpy())


def _ranking(losses: NDArray[Any]) -> NDArray[np.int64]:
    order = np.argsort(losses, kind="stable")
    _LOG.info("lowest losses: %s", losses[order[:10]])
    return order


def isolated(losses_idx: NDArray[np.int64], ratio: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The isolated samples, the first ``int(N * ratio)`` of the order, and all others.

    Raises:
        ValueError: ``ratio`` outside [0, 1].

    Example:
        >>> isolated(np.array([3, 1, 0, 2]), 0.3)
        (array([3]), array([1, 0, 2]))
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(message("isolated", "ratio", "a fraction in [0, 1]", str(ratio), "pass e.g. 0.01"))
    count = int(len(losses_idx) * ratio)
    return losses_idx[:count], losses_idx[count:]


# --- losses ----------------------------------------------------------------------------------------------------------


class LGALoss(nn.Module):
    r"""Local gradient ascent: :math:`\operatorname{sign}(L - \gamma) L`, for the criterion's value L.

    A loss below gamma is pushed up, one above it down; where they are equal the loss is 0 and so is its gradient.

    Args:
        gamma: the loss level, in nats (0.5 in the paper).
        criterion: of logits and labels; a mean over the batch, or one value a sample.

    Example:
        >>> loss = LGALoss(0.5, nn.CrossEntropyLoss())
        >>> f"{loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0])):.4f}"
        '-0.1269'
    """

    def __init__(self, gamma: float, criterion: nn.Module) -> None:
        super().__init__()
        self.gamma = gamma
        self.criterion = criterion

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss, of the criterion's shape."""
        return lga_loss(self, output, target)


class FloodingLoss(nn.Module):
    r"""Flooding: :math:`|L - b| + b`, for the criterion's value L.

    Args:
        flooding: b, in nats (0.5 in the paper).
        criterion: of logits and labels; a mean over the batch, or one value a sample.

    Example:
        >>> loss = FloodingLoss(0.5, nn.CrossEntropyLoss())
        >>> f"{loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0])):.4f}"
        '0.8731'
    """

    def __init__(self, flooding: float, criterion: nn.Module) -> None:
        super().__init__()
        self.flooding = flooding
        self.criterion = criterion

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss, of the criterion's shape."""
        return flooding_loss(self, output, target)


def plain_lga_loss(self: Any, output: Tensor, target: Tensor) -> Tensor:
    """``LGALoss.forward`` as it is usually written."""
    return _lga(self.criterion(output, target), self.gamma)


@switchable(plain_lga_loss)
def lga_loss(self: Any, output: Tensor, target: Tensor) -> Tensor:
    """``LGALoss.forward`` for any module with ``criterion`` and ``gamma``; a plain cross entropy runs fused."""
    return _lga(_value(self.criterion, output, target), self.gamma)


def plain_flooding_loss(self: Any, output: Tensor, target: Tensor) -> Tensor:
    """``FloodingLoss.forward`` as it is usually written."""
    return _flooded(self.criterion(output, target), self.flooding)


@switchable(plain_flooding_loss)
def flooding_loss(self: Any, output: Tensor, target: Tensor) -> Tensor:
    """``FloodingLoss.forward`` for any module with ``criterion`` and ``flooding``; a plain cross entropy runs fused."""
    return _flooded(_value(self.criterion, output, target), self.flooding)


def _lga(loss: Tensor, gamma: float) -> Tensor:
    return torch.sign(loss - gamma) * loss


def _flooded(loss: Tensor, flooding: float) -> Tensor:
    return (loss - flooding).abs() + flooding


def _value(criterion: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """The criterion's value; of a cross entropy without options by one kernel each way (a hinge at 0 changes none)."""
    if (
        type(criterion) is nn.CrossEntropyLoss
        and criterion.weight is None
        and criterion.label_smoothing == 0.0
        and output.dim() == 2
        and target.dtype == torch.int64
        and target.shape == output.shape[:1]
    ):
        reduction: Any = criterion.reduction
        return hinge_cross_entropy(output, target, 0.0, reduction)
    value: Tensor = criterion(output, target)
    return value
