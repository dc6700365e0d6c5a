"""The three ReLUs that MM-BD clips in a ResNet-18, and their counterparts elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from bdfast.nn.relu_sites import Network, Site

_COUNT = 3


def stage_sites(network: Network) -> list[Site]:
    """The ReLUs on the stem, on stage 1 and on stage 2; empty where the network has no such structure.

    ==================================  ==========================================================================
    network                             sites
    ==================================  ==========================================================================
    ResNet (``layer1``, ``layer2``...)  the first ReLU, the last of ``layer1``, the last of ``layer2``
    PreAct-ResNet (no ReLU on a stem)   the first ReLU of ``layer1``, of ``layer2`` and of ``layer3``: those that
                                        read stem, stage 1 and stage 2
    VGG (max pools in ``features``)     the first ReLU, the last before the first pool (VGG11 has one ReLU there, and
                                        so two sites in all), the last before the second
    MobileNetV2 (blocks in              the first ReLU, and those that read stage 1 and stage 2 (blocks of one
    ``features``)                       width); the blocks themselves end without one
    at most three ReLUs in all          each
    ==================================  ==========================================================================

    For other networks see :func:`spread_sites`.
    """
    for path, module in network.model.named_modules():
        prefix = f"{path}." if path else ""
        inside = [site for site in network.sites if site.name.startswith(prefix)]
        for rule in (_resnet, _vgg, _mobilenet):
            found = rule(network, module, prefix, inside)
            if found:
                return found
    return list(network.sites) if len(network.sites) <= _COUNT else []


def spread_sites(network: Network) -> list[Site]:
    """Three ReLUs as far into the network as those of a ResNet-18, which are numbers 0, 4 and 8 of 17.

    Numbers 0, n // 4 and n // 2 of n in the order of execution; empty where not all ReLUs are within reach.
    """
    count = len(network.sites)
    return [] if network.opaque or count <= _COUNT else [network.sites[i] for i in (0, count // 4, count // 2)]


Rule = Callable[[Network, nn.Module, str, list[Site]], "list[Site] | None"]


def _resnet(network: Network, module: nn.Module, prefix: str, sites: list[Site]) -> list[Site] | None:
    children = dict(module.named_children())
    if not {"layer1", "layer2", "layer3"} <= children.keys():
        return None
    stages = [[s for s in sites if s.name.startswith(f"{prefix}layer{k}.")] for k in (1, 2, 3)]
    if not all(stages):
        return None
    if sites[0] in stages[0]:
        return [stage[0] for stage in stages]
    return [sites[0], stages[0][-1], stages[1][-1]]


def _vgg(network: Network, module: nn.Module, prefix: str, sites: list[Site]) -> list[Site] | None:
    features = getattr(module, "features", None)
    if not isinstance(features, nn.Sequential):
        return None
    runs: list[list[Site]] = [[]]
    for name, child in features.named_children():
        if isinstance(child, nn.MaxPool2d):
            runs.append([])
        runs[-1] += [s for s in sites if s.name == f"{prefix}features.{name}"]
    if len(runs) <= 2 or not runs[0] or not runs[1]:
        return None
    return list(dict.fromkeys([runs[0][0], runs[0][-1], runs[1][-1]]))


def _mobilenet(network: Network, module: nn.Module, prefix: str, sites: list[Site]) -> list[Site] | None:
    features = getattr(module, "features", None)
    if not isinstance(features, nn.Sequential) or len(features) < 2 + _COUNT:
        return None
    paths = [f"{prefix}features.{name}" for name, _ in features.named_children()]
    firsts = list(_first_of_each_width(network, paths, sites))
    # The widths are those of the stem, of stage 1, of stage 2, ...; a stage is read by the block behind it.
    return [firsts[0], *firsts[2:4]] if len(firsts) > _COUNT and None not in firsts[:4] else None  # type: ignore[list-item]


def _first_of_each_width(network: Network, paths: list[str], sites: list[Site]) -> Iterator[Site | None]:
    """The first ReLU of the first block of each run of blocks that put out the same number of channels."""
    previous = None
    for path in paths:
        width = network.channels_after(path)
        if width is None:
            return
        if width != previous:
            yield next((s for s in sites if s.name.startswith(f"{path}.")), None)
        previous = width
