"""A frozen network rewritten for a CPU, and compared with what it was."""

from __future__ import annotations

import copy

from torch import Tensor, fx, nn

from bdfast.runtime.forks import fork_relus
from bdfast.runtime.fusing import fuse_relus, skip_identities
from bdfast.runtime.same_network import Behaviour
from bdfast.runtime.winograd import available, replace_convolutions


def for_cpu(
    network: nn.Module,
    probe: Tensor,  # [n, C, H, W], what the network takes
) -> tuple[nn.Module, list[str]]:
    """The network with its 3x3 convolutions as :mod:`.winograd` has them, and their names.

    Where the graph is known, a ReLU and a shortcut behind a convolution become part of it. The graph of ``network`` is
    not changed; a network without one gets new layers in place. It is as it was where the rewritten one differs on the
    probe, in its logits or in their gradient.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()).requires_grad_(False)
        >>> rewritten, names = for_cpu(fx.symbolic_trace(net), torch.rand(2, 16, 8, 8))
        >>> names == (["0.conv"] if available() else []), type(net[0])
        (True, <class 'torch.nn.modules.conv.Conv2d'>)
    """
    if not available():
        return network, []
    before = Behaviour.of(network, probe)
    if isinstance(network, fx.GraphModule):
        rewritten = fx.GraphModule(network, copy.deepcopy(network.graph))
        skip_identities(rewritten)
        fuse_relus(rewritten)
        names = list(replace_convolutions(rewritten))
        fork_relus(rewritten)
        same = bool(names) and before.agrees(Behaviour.of(rewritten, probe))
        return (rewritten, names) if same else (network, [])
    replaced = replace_convolutions(network)
    if not replaced or before.agrees(Behaviour.of(network, probe)):
        return network, list(replaced)
    for name, conv in replaced.items():
        network.set_submodule(name, conv)
    return network, []
