"""A network in bfloat16, but for what that format is too coarse for.

bfloat16 has eight significant bits: near white two neighbours are one pixel value apart (1/256 against 1/255), half a
step of an attack. So the images stay float32 up to the output of the first layer, 0.3 % of the work of a ResNet-18,
where the network's graph shows that nothing else reads them. Statistics of batch norm stay float32 as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bdfast.runtime.folding import ABSORBERS, FrozenBatchNormReLU


class InBfloat16(nn.Module):
    """float32 images to whatever ``network``, which is changed, returns: in bfloat16.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> InBfloat16(net)(torch.rand(2, 1, 2, 2)).dtype
        torch.bfloat16
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        before = _up_to_first_layer(network) if isinstance(network, fx.GraphModule) else None
        kept = {str(node.target) for node in before or () if node.op in ("call_module", "get_attr")}
        for name, module in network.named_modules():
            if name in kept or isinstance(module, (_BatchNorm, FrozenBatchNormReLU)):
                continue
            for store in (module._parameters, module._buffers):
                for key, value in store.items():
                    full = f"{name}.{key}" if name else key
                    if value is not None and value.is_floating_point() and full not in kept:
                        value.data = value.data.to(torch.bfloat16)
        self._casts_inside = before is not None
        if before is not None:
            assert isinstance(network, fx.GraphModule)
            _cast_behind(network, before[-1])

    def forward(self, x: Tensor) -> Any:
        return self.network(self.entering(x))

    def entering(self, x: Tensor) -> Tensor:
        """The images as ``network`` takes them."""
        return x if self._casts_inside else x.to(torch.bfloat16)


def _up_to_first_layer(network: fx.GraphModule) -> list[fx.Node] | None:
    """The nodes up to the first convolution or linear layer, which comes last; None where the rest reads them too."""
    nodes = list(network.graph.nodes)
    layers = (
        node
        for node in nodes
        if node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), ABSORBERS)
    )
    first = next(layers, None)
    if first is None:
        return None
    before = {first}
    stack = [first]
    while stack:
        new = [node for node in stack.pop().all_input_nodes if node not in before]
        before.update(new)
        stack += new
    if any(user not in before for node in before - {first} for user in node.users):
        return None
    reads = [str(node.target) for node in nodes if node.op == "call_module"]
    if reads.count(str(first.target)) > 1:
        return None
    return [node for node in nodes if node in before]


def _cast_behind(network: fx.GraphModule, layer: fx.Node) -> None:
    with network.graph.inserting_after(layer):
        cast = network.graph.call_method("to", (layer, torch.bfloat16))
    layer.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    network.recompile()
