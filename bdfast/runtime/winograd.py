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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


class ConvShape(NamedTuple):
    """What of a convolution is not its weights.

    Example:
        >>> ConvShape.of(nn.Conv2d(16, 32, 3, padding=1)).output(torch.Size((2, 16, 8, 8)))
        (2, 32, 8, 8)
    """

    channels: int
    outputs: int
    padding: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> ConvShape:
        """That of a layer that :func:`fits`."""
        padding = conv.padding[0]
        assert isinstance(padding, int)
        return cls(conv.in_channels, conv.out_channels, padding)

    def turned(self) -> ConvShape:
        """That of the convolution which takes the gradient of the output to that of the input."""
        return ConvShape(self.outputs, self.channels, 2 - self.padding)

    def output(self, x: torch.Size) -> tuple[int, int, int, int]:
        """``[N, O, H', W']`` for ``[N, C, H, W]``."""
        return x[0], self.outputs, x[2] + 2 * self.padding - 2, x[3] + 2 * self.padding - 2


class WinogradConv(nn.Module):
    """``conv(x)`` of a 3x3 convolution that is not trained, with the ReLU behind it and a shortcut if asked for.

    Inputs that it is not for go through the convolution itself: other devices and dtypes, images so small or so few
    that nothing is saved, and everything under ``bdfast.backend("reference")``.

    Args:
        conv: one that :func:`suits`; its weights are transformed at the first call, forward and backward.

    Example:
        >>> conv = nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
        >>> x = torch.rand(2, 16, 8, 8)
        >>> torch.allclose(WinogradConv(conv)(x), conv(x), atol=1e-5)
        True
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self._shape = ConvShape.of(conv)
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
        if not takes(x, self._shape) or (z is not None and z.dtype != x.dtype):
            y: Tensor = self.conv(x)
            y = y if z is None else y + z
            return torch.relu(y) if relu else y
        bias = None if self.conv.bias is None else self.conv.bias.float()
        return convolve(x, self._weights(gradient=False), self._shape, bias=bias, z=z, relu=relu)

    def input_gradient(
        self,
        grad: Tensor,  # [N, O, H', W']
        x: Tensor,  # [N, C, H, W], whose values do not matter
        output: Tensor | None = None,  # [N, O, H', W']
    ) -> Tensor:
        """The gradient to x from that of ``conv(x)``, or, where that is given, from that of ``output``, its ReLU."""
        if not takes(x, self._shape) or grad.dtype != x.dtype:
            grad = grad if output is None else torch.ops.aten.threshold_backward(grad, output, 0)
            return input_gradient(grad, x, self.conv)
        return convolve(grad, self._weights(gradient=True), self._shape.turned(), output=output)

    def _weights(self, *, gradient: bool) -> Tensor:
        if gradient not in self._packed:
            self._packed[gradient] = pack(self.conv.weight.float(), gradient=gradient)
        return self._packed[gradient]


class _WinogradConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: WinogradConv) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer.run(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.layer.input_gradient(grad, x), None


def fits(conv: nn.Module) -> bool:
    """Whether a layer is a plain 3x3 convolution of stride 1, with as many channels as fill a register.

    Example:
        >>> fits(nn.Conv2d(64, 64, 3, padding=1)), fits(nn.Conv2d(3, 64, 3, padding=1))
        (True, False)
    """
    if type(conv) is not nn.Conv2d or has_hooks(conv) or list(conv._parameters) != ["weight", "bias"]:
        return False
    shape = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1
    padding = conv.padding_mode == "zeros" and conv.padding in ((0, 0), (1, 1), (2, 2))
    return shape and padding and min(conv.in_channels, conv.out_channels) >= _LEAST_CHANNELS


def suits(conv: nn.Module) -> bool:
    """Whether a layer can be a :class:`WinogradConv`: it :func:`fits`, and is not trained.

    Example:
        >>> conv = nn.Conv2d(64, 64, 3, padding=1)
        >>> suits(conv), suits(conv.requires_grad_(False))
        (False, True)
    """
    trained = any(p.requires_grad or p.dtype not in _DTYPES for p in conv.parameters())
    return fits(conv) and not trained


def unavailable() -> str | None:
    """Why no convolution is replaced on this machine, or None."""
    if not _ENABLED:
        return "switched off"
    if (reason := cpp_missing()) is not None:
        return reason
    return None if native().cpu_isa != "baseline" else "this processor has no fused multiply-adds, which it lives on"


def available() -> bool:
    """Whether this machine has the kernels, and they are faster there."""
    return unavailable() is None


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


# --- the kernels -----------------------------------------------------------------------------------------------------


def takes(x: Tensor, shape: ConvShape) -> bool:
    """Whether the kernels compute the convolution of x, and are faster."""
    dtype = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not _has_tiles())
    return x.is_cpu and dtype and x.shape[1] == shape.channels and _pays(x.shape, shape.padding) and _wanted()


def pack(
    weight: Tensor,  # [O, C, 3, 3] float32
    *,
    gradient: bool = False,
) -> Tensor:
    """Weights transformed, and in the order of the kernel, forward or for the gradient to the input."""
    outputs, channels = weight.shape[:2]
    size = native().winograd_packed(*((channels, outputs) if gradient else (outputs, channels)))
    packed = weight.new_empty(size, dtype=torch.float32)
    native().winograd_pack(weight.data_ptr(), weight.stride(), outputs, channels, gradient, packed.data_ptr())
    return packed


def convolve(
    x: Tensor,  # [N, C, H, W]
    packed: Tensor,
    shape: ConvShape,
    *,
    bias: Tensor | None = None,  # [O] float32
    z: Tensor | None = None,  # [N, O, H', W'], of the dtype of x
    relu: bool = False,
    output: Tensor | None = None,  # [N, C, H, W], of the dtype of x
) -> Tensor:
    """``relu(conv(x) + bias + z)``, channels_last, of the dtype of x; x counts as 0 where ``output`` <= 0."""
    size = shape.output(x.shape)
    x = x.contiguous(memory_format=torch.channels_last)
    z = None if z is None else z.expand(size).contiguous(memory_format=torch.channels_last)
    output = None if output is None else output.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
    native().winograd_conv(
        x.data_ptr(), _address(output), *_image(x), shape.padding, packed.data_ptr(), _address(bias), _address(z),
        relu, y.data_ptr(), shape.outputs,
    )  # fmt: skip
    return y


def weight_gradient(
    x: Tensor,  # [N, C, H, W], channels_last
    grad: Tensor,  # [N, O, H', W'], channels_last, of the dtype of x
    weight: Tensor,  # [O, C, 3, 3] float32, whose values do not matter
    shape: ConvShape,
) -> Tensor:
    """The gradient to the weights, with the strides of ``weight``; the same bits on any number of threads."""
    out = torch.empty_like(weight)
    native().winograd_weight_gradient(
        x.data_ptr(), *_image(x), shape.padding, grad.data_ptr(), shape.outputs, out.data_ptr(), out.stride()
    )
    return out


def _image(x: Tensor) -> tuple[int, int, int, int, int]:
    """Its dtype, and N, H, W and C."""
    n, c, h, w = x.shape
    return DTYPE_CODE[x.dtype], n, h, w, c


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
