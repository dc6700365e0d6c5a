r"""CLP (Zheng et al., ECCV 2022, arXiv 2208.03111): prune channels by their Lipschitz bound, without any data.

For output channel k of a convolution and the batch norm behind it,

.. math::

    L_k = \sigma_{\max}(W_k) \, \Bigl| \frac{\gamma_k}{\sqrt{\sigma_k^2}} \Bigr|, \qquad
    \text{prune } k \text{ where } L_k > \operatorname{mean}(L) + u \operatorname{std}(L)

with :math:`W_k` the kernel as a matrix [C_in, kh kw], the running variance without its eps, and the unbiased standard
deviation over the channels of the layer. Pruning sets gamma and beta of the channel to 0. "Behind" means module order:
a batch norm belongs to the last convolution registered before it, which in a pre-activation block is that of the block
before.

The usual loop decomposes one matrix at a time, 3,392 of them in PreAct-ResNet18, for each of 21 values of u. The
singular values depend on neither u nor the batch norm: here they are square roots of the largest eigenvalues of small
Gram matrices (9 x 9 for 3 x 3 kernels), all channels of a layer at once, and are kept from call to call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from bdfast.errors import message
from bdfast.integrations.backdoorbench.accelerated.switch import switchable

_WHERE = "CLP_prune"


@torch.no_grad()
def plain_CLP_prune(net: nn.Module, u: float) -> None:
    """The usual loop: one singular value decomposition a channel, on the processor."""
    for name, conv, norm in _pairs(net):
        std = _running_var(name, norm).sqrt()
        lips = []
        for k, gamma in enumerate(norm.weight):
            kernel = conv.weight[k].reshape(conv.weight.shape[1], -1)
            scale = (gamma / std[k]).abs() if gamma != 0 else gamma
            lips.append(_times_zero_is_zero(torch.linalg.svdvals(kernel.cpu()).max(), scale.cpu()))
        _prune(norm, _outliers(torch.stack(lips), u).to(norm.weight.device))


@switchable(plain_CLP_prune)
def CLP_prune(net: nn.Module, u: float) -> None:
    """Set gamma and beta to 0 in every channel of ``net`` whose Lipschitz bound stands out, in place.

    Prunes the channels that the usual loop prunes; bounds agree to 1e-6 relative. Singular values of weights that were
    seen in the call before (a deep copy too) are reused: a sweep of u decomposes once.

    Channels whose ``running_var`` is 0, where the usual loop stops in the decomposition: such a channel is pruned,
    unless its gamma or its kernel is 0, and does not count in mean and standard deviation.

    Args:
        net: with ``Conv2d`` and affine ``BatchNorm2d`` modules that track running statistics.
        u: how many standard deviations above the mean are too many (3 in the paper).

    Raises:
        ValueError: a batch norm has no convolution before it, more channels than that, no affine parameters or no
            running statistics.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6))
        >>> with torch.no_grad():
        ...     net[0].weight[:] = torch.tensor([1.0, 1.1, 0.9, 1.0, 1.0, 9.0])[:, None, None, None]
        >>> CLP_prune(net, 2.0)
        >>> net[1].weight.tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    """
    for layer in list(_bounds(net)):  # all checks come before the first change
        _prune(layer.norm, _outliers(layer.lips, u))


def channel_lipschitz(net: nn.Module) -> dict[str, Tensor]:  # name -> [C] float32
    """The bounds L_k of every batch norm, by its name in ``net``.

    Raises:
        ValueError: as :func:`CLP_prune`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False), nn.BatchNorm2d(1))
        >>> with torch.no_grad():
        ...     net[0].weight[:] = torch.tensor([3.0, 4.0])[None, :, None, None]
        >>> channel_lipschitz(net)
        {'1': tensor([5.])}
    """
    return {layer.name: layer.lips for layer in _bounds(net)}


def clp_sweep(net: nn.Module, thresholds: Iterable[float]) -> list[dict[str, Tensor]]:
    """What CLP would prune for each u: indices of channels, int64, by the name of the batch norm. Changes nothing.

    Raises:
        ValueError: as :func:`CLP_prune`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6))
        >>> with torch.no_grad():
        ...     net[0].weight[:] = torch.tensor([1.0, 1.1, 0.9, 1.0, 1.0, 9.0])[:, None, None, None]
        >>> clp_sweep(net, [2.0, 3.0])
        [{'1': tensor([5])}, {'1': tensor([], dtype=torch.int64)}]
    """
    layers = [(name, lips, *_mean_and_std(lips)) for name, lips in channel_lipschitz(net).items()]
    return [
        {name: _above(lips, mean + u * std).nonzero()[:, 0] for name, lips, mean, std in layers} for u in thresholds
    ]


# --- bounds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    name: str
    norm: nn.BatchNorm2d
    lips: Tensor  # [C]


def _pairs(net: nn.Module) -> Iterator[tuple[str, nn.Conv2d, nn.BatchNorm2d]]:
    """Every batch norm with the last convolution before it, in module order."""
    conv: nn.Conv2d | None = None
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            conv = module
        elif isinstance(module, nn.BatchNorm2d):
            if conv is None:
                expected = f"a convolution before `{name}` in module order"
                raise ValueError(message(_WHERE, "net", expected, "none", "CLP bounds a batch norm behind one"))
            if module.weight is None or module.bias is None:
                expected = f"weight and bias in `{name}`"
                raise ValueError(message(_WHERE, "net", expected, "affine=False", "there is nothing to prune by"))
            if len(module.weight) > len(conv.weight):
                expected = f"at most {len(conv.weight)} channels in `{name}`, as the convolution before it has"
                remedy = "CLP does not cover concatenated channels"
                raise ValueError(message(_WHERE, "net", expected, str(len(module.weight)), remedy))
            yield name, conv, module


def _running_var(name: str, norm: nn.BatchNorm2d) -> Tensor:
    if norm.running_var is None:
        expected = f"running statistics in `{name}`"
        raise ValueError(message(_WHERE, "net", expected, "track_running_stats=False", "CLP needs the variance"))
    return norm.running_var


@torch.no_grad()
def _bounds(net: nn.Module) -> Iterator[_Layer]:
    sigmas: dict[nn.Conv2d, Tensor] = {}
    for place, (name, conv, norm) in enumerate(_pairs(net)):
        if conv not in sigmas:
            sigmas[conv] = _KEPT.sigma_max(place, conv.weight.detach())
        scale = norm.weight / _running_var(name, norm).sqrt()  # 0 / 0 where gamma and variance are 0
        scale = torch.where(norm.weight == 0, torch.zeros_like(scale), scale.abs()).float()
        yield _Layer(name, norm, _times_zero_is_zero(sigmas[conv][: len(scale)], scale))


def _times_zero_is_zero(sigma: Tensor, scale: Tensor) -> Tensor:
    """0 for a kernel of zeros, however large the scale."""
    return torch.where(sigma == 0, torch.zeros_like(sigma), sigma * scale)


def _outliers(lips: Tensor, u: float) -> Tensor:  # [C] -> [C] bool
    """Above the level of the layer; infinite bounds always."""
    mean, std = _mean_and_std(lips)
    return _above(lips, mean + u * std)


def _above(lips: Tensor, level: Tensor) -> Tensor:
    return (lips > level) | (lips == float("inf"))


def _mean_and_std(lips: Tensor) -> tuple[Tensor, Tensor]:
    """Of the finite bounds; NaN, which nothing exceeds, where there are fewer than two. No wait for the device."""
    finite = lips.isfinite()
    count = finite.sum()
    mean = torch.where(finite, lips, 0.0).sum() / count
    squares = torch.where(finite, (lips - mean).square(), 0.0).sum()
    return mean, (squares / (count - 1)).sqrt()


@torch.no_grad()
def _prune(norm: nn.BatchNorm2d, channels: Tensor) -> None:
    norm.weight.masked_fill_(channels, 0.0)
    norm.bias.masked_fill_(channels, 0.0)


def sigma_max(weight: Tensor) -> Tensor:  # [K, C_in, ...] -> [K] float32
    """The largest singular value of each ``weight[k]`` as a matrix [C_in, rest].

    From the Gram matrix of its shorter side: squaring costs the small singular values their digits, but the largest one
    keeps a relative error of a few float32 roundings.

    Example:
        >>> sigma_max(torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]))
        tensor([3.])
    """
    w = weight.float().flatten(2)
    if min(w.shape[1:]) == 1:
        return cast(Tensor, torch.linalg.vector_norm(w, dim=(1, 2)))
    gram = w.mT @ w if w.shape[2] <= w.shape[1] else w @ w.mT
    largest: Tensor = torch.linalg.eigvalsh(gram)[:, -1]
    return largest.clamp_min(0.0).sqrt()


class _Kept:
    """Singular values of the network seen last, with the weights that they belong to."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Tensor, Tensor]] = {}

    def sigma_max(self, place: int, weight: Tensor) -> Tensor:
        """Of ``weight``, the convolution of the batch norm number ``place``."""
        seen, sigma = self._entries.get(place, (None, None))
        if seen is None or sigma is None or not _same(seen, weight):
            seen, sigma = weight.clone(), sigma_max(weight)
            self._entries[place] = (seen, sigma)
        return sigma

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


_KEPT = _Kept()


def clear_cache() -> None:
    """Forget the singular values that :func:`CLP_prune` keeps, and the copies of the weights beside them.

    Example:
        >>> clear_cache()
    """
    _KEPT.clear()
