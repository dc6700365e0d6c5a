r"""3x3 convolutions on a CPU with a quarter of the products, by Winograd's F(4x4, 3x3).

.. math::

    Y = A^\top \big[ (G g G^\top) \odot (B^\top d B) \big] A

for each tile Y of 4x4 outputs, which a patch d of 6x6 inputs and the weights g decide: 36 products for 144 (Lavin and
Gray, *Fast Algorithms for Convolutional Neural Networks*, 2015; ``csrc/include/winograd_tile.h`` has the matrices).
A frozen network's weights are transformed once. Sums are float32; with the points used here their error is some 2.5
times that of plain summation. The gradient to the input is the same convolution with the weights turned around.

An image's result depends on neither its batch nor the number of threads.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from bdfast.backends.availability import cpp_missing, native
from bdfast.backends.selection import from_environment, requested
from bdfast.ops.rows import DTYPE_CODE
from bdfast.runtime.hooks import has_hooks

TILE = 4  # outputs a side
_LEAST_CHANNELS = 16  # those of a register
_LEAST_TILES = 6  # rows of a product; with fewer, reading four times the weights costs more than it saves
_LEAST_USE = 0.5  # of the outputs of all tiles; at a quarter as many products are left as without
_DTYPES = (torch.float32, torch.bfloat16)
_ENABLED = True  # for comparisons: no convolution is replaced where this is False


class WinogradConv(nn.Module):
    """``conv(x)`` of a 3x3 convolution that is not trained, with the ReLU behind it and a shortcut if asked for.

    Inputs that it is not for go through the convolution itself: other devices and dtypes, images so small or so few
    that nothing is saved, and everything under ``bdfast.backend("reference")``.

    Args:
        conv: one that :func:`suits`; a copy of its weights is kept.

    Example:
        >>> conv = nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
        >>> x = torch.rand(2, 16, 8, 8)
        >>> torch.allclose(WinogradConv(conv)(x), conv(x), atol=1e-5)
        True
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self._packed: dict[bool, Tensor] = {}

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _WinogradConv.apply(x, self)  # type: ignore[no-untyped-call,no-any-return]
        return self.run(x)

    def run(
        self,
        x: Tensor,  # [N, C, H, W]
        z: Tensor | None = None,  # [N, O, H', W'], added
        *,
        relu: bool = False,
    ) -> Tensor:
        """``relu(conv(x) + z)``, ``[N, O, H', W']``, without a graph."""
        if not self._takes(x) or (z is not None and z.dtype != x.dtype):
            y: Tensor = self.conv(x)
            y = y if z is None else y + z
            return torch.relu(y) if relu else y
        return self._convolve(x, z, relu=relu, gradient=False)

    def input_gradient(
        self,
        grad: Tensor,  # [N, O, H', W']
        x: Tensor,  # [N, C, H, W], whose values do not matter
        output: Tensor | None = None,  # [N, O, H', W']
    ) -> Tensor:
        """The gradient to x from that of ``conv(x)``, or, where that is given, from that of ``output``, its ReLU."""
        if not self._takes(x) or grad.dtype != x.dtype:
            grad = grad if output is None else torch.ops.aten.threshold_backward(grad, output, 0)
            return input_gradient(grad, x, self.conv)
        return self._convolve(grad, None, relu=False, gradient=True, output=output)

    def _takes(self, x: Tensor) -> bool:
        padding = self.conv.padding[0]
        assert isinstance(padding, int)
        taken = x.is_cpu and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not _has_tiles()))
        return taken and _pays(x.shape, padding) and _wanted()

    def _weights(self, gradient: bool) -> Tensor:
        """Transformed, and in the order of the kernel."""
        if gradient not in self._packed:
            self._packed[gradient] = _pack(self.conv.weight.detach().float(), gradient)
        return self._packed[gradient]

    def _convolve(
        self, x: Tensor, z: Tensor | None, *, relu: bool, gradient: bool, output: Tensor | None = None
    ) -> Tensor:
        padding = self.conv.padding[0]
        assert isinstance(padding, int)
        padding = 2 - padding if gradient else padding
        outputs = self.conv.in_channels if gradient else self.conv.out_channels
        bias = None if gradient or self.conv.bias is None else self.conv.bias.detach().float()
        n, c, h, w = x.shape
        shape = (n, outputs, h + 2 * padding - 2, w + 2 * padding - 2)
        x = x.detach().contiguous(memory_format=torch.channels_last)
        z = None if z is None else z.detach().expand(shape).contiguous(memory_format=torch.channels_last)
        output = None if output is None else output.contiguous(memory_format=torch.channels_last)
        y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        native().winograd_conv(
            x.data_ptr(), _address(output), DTYPE_CODE[x.dtype], n, h, w, c, padding,
            self._weights(gradient).data_ptr(), _address(bias), _address(z), relu, y.data_ptr(), outputs,
        )  # fmt: skip
        return y


class _WinogradConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: WinogradConv) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer.run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return ctx.layer.input_gradient(grad, x), None


def suits(conv: nn.Module) -> bool:
    """Whether a layer can be a :class:`WinogradConv`: a plain 3x3 convolution of stride 1 with frozen weights.

    Example:
        >>> suits(nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False))
        True
        >>> suits(nn.Conv2d(3, 64, 3, padding=1).requires_grad_(False))  # as many registers for 3 channels as for 16
        False
    """
    if type(conv) is not nn.Conv2d or has_hooks(conv) or list(conv._parameters) != ["weight", "bias"]:
        return False
    if any(p.requires_grad for p in conv.parameters()) or conv.weight.dtype not in _DTYPES:
        return False
    shape = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1
    padding = conv.padding_mode == "zeros" and conv.padding in ((0, 0), (1, 1), (2, 2))
    return shape and padding and min(conv.in_channels, conv.out_channels) >= _LEAST_CHANNELS


def available() -> bool:
    """Whether this machine has the kernel, and it is faster there: it lives on fused multiply-adds."""
    return _ENABLED and cpp_missing() is None and native().cpu_isa != "baseline"


def replace_convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    """Put :class:`WinogradConv` in place of the layers that it :func:`suits`; those, by name. ``network`` is changed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()).requires_grad_(False)
        >>> list(replace_convolutions(net)) == (["0"] if available() else [])
        True
    """
    if not available():
        return {}
    replaced = {name: module for name, module in network.named_modules() if suits(module) and name}
    for name, conv in replaced.items():
        network.set_submodule(name, WinogradConv(conv))  # type: ignore[arg-type]
    return replaced  # type: ignore[return-value]


def input_gradient(
    grad: Tensor,  # [N, O, H', W']
    x: Tensor,  # [N, C, H, W]
    conv: nn.Conv2d,
) -> Tensor:
    """The gradient to the input of a convolution, by PyTorch."""
    grad_x, _, _ = torch.ops.aten.convolution_backward(
        grad, x, conv.weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups,
        [True, False, False],
    )  # fmt: skip
    assert isinstance(grad_x, Tensor)
    return grad_x


def _pack(
    weight: Tensor,  # [O, C, 3, 3] float32
    gradient: bool,
) -> Tensor:
    """Transformed, and in the order of the kernel, forward or backward."""
    outputs, channels = weight.shape[:2]
    packed = torch.empty(native().winograd_packed(*((channels, outputs) if gradient else (outputs, channels))))
    native().winograd_pack(weight.data_ptr(), weight.stride(), outputs, channels, gradient, packed.data_ptr())
    return packed


def _pays(shape: torch.Size, padding: int) -> bool:
    n, _, h, w = shape
    height, width = h + 2 * padding - 2, w + 2 * padding - 2
    tiles = -(-height // TILE) * -(-width // TILE)
    if min(height, width) < 1 or n * tiles < _LEAST_TILES:
        return False
    return height * width >= _LEAST_USE * tiles * TILE**2


@functools.cache
def _has_tiles() -> bool:
    """Whether the CPU multiplies tiles of bfloat16 (AMX), 16 times as fast as float32, which is more than is saved."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def _wanted() -> bool:
    name = requested("auto", "winograd")
    return (from_environment() if name == "auto" else name) in ("auto", "cpp")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
