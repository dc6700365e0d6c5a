r"""EP (Zheng et al., NeurIPS 2022, "Pre-activation distributions expose backdoor neurons"): prune by entropy.

For channel c of a normalisation layer and one batch of partly poisoned data, with z the channel's input maxima over
space, standardised over the batch by the unbiased standard deviation,

.. math::

    H_c = -\sum_n p_{cn} \log p_{cn}, \qquad
    \text{prune } c \text{ where } H_c < \operatorname{mean}(H) - u \operatorname{std}(H)

and :math:`p_{cn}` the share of the batch in bin n, of width 0.1: :func:`bdfast.ops.histogram_entropy`. Pruning sets
gamma and beta of the channel to 0. The usual loop passes over z once a bin, a hundred times a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bdfast.errors import message
from bdfast.integrations.backdoorbench.accelerated.switch import switchable
from bdfast.ops import histogram_entropy

PIECE = 16  # images a forward pass: on two cores the activations of 128 leave the cache, and take 1.6 times as long

_WHERE = "EP_defense"

# --- entropy ---------------------------------------------------------------------------------------------------------


def plain_batch_entropy(x: Tensor, step_size: float = 0.1, *, compat: bool = True) -> Tensor:
    """The usual loop: a pass over ``x`` for every bin (``compat`` bins alone)."""
    if not compat:
        return histogram_entropy(x.flatten(0, -2), step_size, compat=False, backend="reference").view(x.shape[:-1])
    low = x.min()
    entropy = torch.zeros(x.shape[:-1], dtype=x.dtype, device=x.device)
    for n in range(int((x.max() - low) / step_size)):
        inside = (x > low + n * step_size) & (x < low + (n + 1) * step_size)
        p = inside.sum(dim=-1) / x.shape[-1]
        entropy -= p * p.log().nan_to_num(0.0)
    return entropy


@switchable(plain_batch_entropy)
def batch_entropy(x: Tensor, step_size: float = 0.1, *, compat: bool = True) -> Tensor:
    """Entropy of each row of ``x`` ``[..., M]``, in bins of ``step_size`` from the smallest element of all.

    Counts exactly what the usual loop counts; entropies agree to 2e-6 relative. Elements on an edge of a bin are
    dropped (``compat=True``), see :func:`bdfast.ops.histogram_entropy`. Where the usual loop returns the number 0,
    because the range holds no bin, this is a tensor of zeros; where it stops at NaN or infinity, a tensor of NaN.

    Returns:
        ``[...]`` float32 (float64 for float64).

    Raises:
        TypeError, ValueError: as :func:`bdfast.ops.histogram_entropy`.

    Example:
        >>> batch_entropy(torch.tensor([[0.0, 0.5, 0.5, 1.5], [0.5, 1.5, 2.5, 3.0]]), 1.0)
        tensor([0.6931, 1.0397])
    """
    if not isinstance(x, Tensor) or x.dim() == 0:
        expected, got = "a tensor [..., M]", "a number" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(message("batch_entropy", "x", expected, got, "pass one row a channel"))
    return histogram_entropy(x.reshape(-1, x.shape[-1]), step_size, compat=compat).view(x.shape[:-1])


# --- defense ---------------------------------------------------------------------------------------------------------


def plain_EP_defense(net: nn.Module, u: float, mixture_data_loader: Iterable[Any], args: Any) -> None:
    """The same with the usual loop over bins."""
    _prune_by_entropy(net, u, mixture_data_loader, args, plain_batch_entropy, piece=None)


@switchable(plain_EP_defense)
def EP_defense(net: nn.Module, u: float, mixture_data_loader: Iterable[Any], args: Any) -> None:
    """Prune, in place, every channel of ``net`` whose entropy over the first batch of the loader is low.

    Prunes what the usual loop prunes, but for channels whose entropy lies within rounding of the threshold. Batch norms
    are read by hooks, so any network will do; layer norms have to collect their inputs themselves (``collect_feats``,
    ``batch_feats``), as those of BackdoorBench's networks for EP do. A channel without variance counts as constant 0,
    where the usual loop stops at its NaN.

    Args:
        net: on the device; left in eval mode, as the usual loop leaves it.
        u: how many standard deviations below the mean are too few (3 in the paper).
        mixture_data_loader: yields batches whose first element is images.
        args: has ``device``.

    Raises:
        ValueError: the loader is empty, or a layer cannot be read or pruned.

    Example:
        >>> from types import SimpleNamespace
        >>> net = nn.Sequential(nn.BatchNorm2d(20))
        >>> images = torch.randn(200, 20, 1, 1, generator=torch.Generator().manual_seed(0))
        >>> images[:, 7] = images[:, 7].sign() + 0.01 * images[:, 7]  # a neuron with two states
        >>> EP_defense(net, 3.0, [(images,)], SimpleNamespace(device="cpu"))
        >>> (net[0].weight == 0).nonzero().flatten()
        tensor([7])
    """
    _prune_by_entropy(net, u, mixture_data_loader, args, batch_entropy, piece=PIECE)


@torch.no_grad()
def _prune_by_entropy(
    net: nn.Module,
    u: float,
    mixture_data_loader: Iterable[Any],
    args: Any,
    measure: Callable[[Tensor], Tensor],
    piece: int | None,  # images a forward pass on the processor
) -> None:
    batch = next(iter(mixture_data_loader), None)
    if batch is None:
        raise ValueError(message(_WHERE, "mixture_data_loader", "at least one batch", "none", "pass the mixed set"))
    net.eval()
    layers = _layers(net)
    images = batch[0].to(args.device)
    if images.device.type != "cpu" or any(isinstance(module, nn.LayerNorm) for module in layers.values()):
        piece = None  # a GPU takes all at once; layers that collect their own inputs keep those of the last pass
    found = []
    for some in images.split(piece or max(len(images), 1)):
        with _collect(layers) as maxima:
            net(some)
        found.append(maxima)
    for name, module in layers.items():
        known = name in found[0]
        feats = torch.cat([m[name] for m in found], dim=1) if known else getattr(module, "batch_feats", None)
        if feats is None:
            raise ValueError(message(_WHERE, "net", f"`{name}` to run in a forward pass", "no input", "remove it"))
        z = (feats - feats.mean(dim=1, keepdim=True)) / feats.std(dim=1, keepdim=True)
        entropy = measure(z.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
        channels = entropy < entropy.mean() - u * entropy.std()
        module.weight.masked_fill_(channels, 0.0)
        module.bias.masked_fill_(channels, 0.0)


def _layers(net: nn.Module) -> dict[str, Any]:
    found = {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)}
    for name, module in found.items():
        if module.weight is None or module.bias is None:
            expected = f"weight and bias in `{name}`"
            raise ValueError(message(_WHERE, "net", expected, "none", "there is nothing to prune by"))
        if isinstance(module, nn.LayerNorm) and not hasattr(module, "collect_feats"):
            expected = f"`{name}` to collect its inputs (`collect_feats`)"
            remedy = "build the network that BackdoorBench builds for EP"
            raise ValueError(message(_WHERE, "net", expected, "a plain LayerNorm", remedy))
    return found


@contextmanager
def _collect(layers: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Inside, maxima over space of what batch norms see, [C, N] by name; layer norms collect their own."""
    maxima: dict[str, Tensor] = {}
    handles = []
    own: list[tuple[Any, bool]] = []
    try:
        for name, module in layers.items():
            if isinstance(module, nn.BatchNorm2d):
                handles.append(module.register_forward_pre_hook(partial(_keep_maxima, maxima, name)))
            else:
                own.append((module, module.collect_feats))
                module.collect_feats = True
        yield maxima
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in own:
            module.collect_feats = flag


def _keep_maxima(maxima: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    maxima[name] = inputs[0].flatten(2).amax(dim=2).t()
