"""A network that is asked and never trained: gradients reach its input alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from bdfast.errors import message
from bdfast.nn.normalize import normalized, statistics
from bdfast.runtime.bfloat16 import InBfloat16
from bdfast.runtime.cpu_graph import for_cpu
from bdfast.runtime.determinism import isolated_rng
from bdfast.runtime.folding import FoldReport, fold
from bdfast.runtime.gpu_graph import for_gpu
from bdfast.runtime.guard import check_in_memory, model_device, usable_device
from bdfast.runtime.hooks import silence_hooks
from bdfast.runtime.outputs import first_pass, logits_of
from bdfast.runtime.precision import PRECISIONS, Precision

LossFunction: TypeAlias = Callable[[Tensor], Tensor]
"""Logits [N, K] float32 to losses [N]."""

_PROBE = 2  # images on which the rewritten network is compared with the original


class FrozenModel:
    """A copy of a model in eval mode, rewritten to be run forward, and backward to its input, as fast as it goes.

    Nothing of it requires a gradient, so that no weight gradient is computed; batch norms are folded into the layers
    before them where that is exact (:mod:`bdfast.runtime.folding`, checked on the first images that come);
    convolutions run channels_last, and on a CPU those of 3x3 with fewer products (:mod:`bdfast.runtime.winograd`). The
    caller's model, its modes, flags and buffers are not touched, and what later happens to it does not matter here.

    Args:
        model: from NCHW float images to logits ``[N, K]``, or to an output with ``.logits``.
        precision: ``"fp32"``, or ``"bf16"``: weights and activations in bfloat16 from the second layer on (see
            :mod:`bdfast.runtime.bfloat16`), logits returned in float32.
        channels_last: memory format of weights and activations.
        normalize: ``(mean, std)`` of a model that does not normalise its own input.
        fold: fold batch norms.
        compile: run through ``torch.compile``; the first call of each batch size then takes long.
        device: where to run; None is where the model is.
        where: the function on whose behalf this happens; it opens the messages.

    Attributes:
        device: where the copy is.
        report: what became of the batch norms, after the first call; see :class:`bdfast.runtime.folding.FoldReport`.

    Raises:
        TypeError, ValueError: arguments of another kind, or a model that cannot be copied.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
        >>> with FrozenModel(net) as frozen:
        ...     losses, grad = frozen.input_gradient(torch.rand(4, 1, 3, 3), lambda logits: logits.square().sum(1))
        ...     losses.shape, grad.shape, frozen.report.folded, net.training
        (torch.Size([4]), torch.Size([4, 1, 3, 3]), ('1',), True)
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Precision = "fp32",
        channels_last: bool = True,
        normalize: tuple[float | Sequence[float], float | Sequence[float]] | None = None,
        *,
        fold: bool = True,
        compile: bool = False,
        device: str | torch.device | None = None,
        where: str = "FrozenModel",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(message(where, "model", "a torch.nn.Module", type(model).__name__, "wrap it in a Module"))
        check_in_memory(where, model)
        if precision not in PRECISIONS:
            raise ValueError(
                message(where, "precision", " or ".join(PRECISIONS), repr(precision), "choose one of them")
            )
        self.device = model_device(model) if device is None else usable_device(where, device)
        self.precision: Precision = precision
        self._where = where
        self.report = FoldReport(reason="not asked for" if not fold else "not called yet")
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._fold, self._compile = fold, compile
        self._source: nn.Module | None = _frozen_copy(where, model, normalize, self.device)
        self._forward: Callable[[Tensor], Any] | None = None

    def __enter__(self) -> FrozenModel:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the copy."""
        self._source = self._forward = None

    def logits(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor:
        """Logits ``[N, K]`` in float32, without a graph.

        Raises:
            TypeError, ValueError: ``x`` is no float ``[N, C, H, W]``, or the model returns something else than logits.
            RuntimeError: after the ``with`` block.
        """
        with self._plain_mode(x), torch.no_grad():
            return self._run(x.detach())

    def input_gradient(
        self,
        x: Tensor,  # [N, C, H, W]
        loss_function: LossFunction,
    ) -> tuple[Tensor, Tensor]:
        """Loss of each sample, and its gradient with respect to that sample.

        Args:
            x: ``[N, C, H, W]`` float.
            loss_function: float32 logits ``[N, K]`` to losses ``[N]``; row i must depend on image i alone, as it does
                in a network in eval mode.

        Returns:
            losses ``[N]`` float32 without a graph, and the gradient of their sum, of shape, dtype and memory format
            of ``x``.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`logits`; losses of another shape.
        """
        with self._plain_mode(x), torch.enable_grad():
            leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
            losses = loss_function(self._run(leaf))
            if losses.shape != x.shape[:1]:
                got, remedy = str(list(losses.shape)), "return one loss a sample"
                raise ValueError(message("input_gradient", "loss_function", f"losses [{len(x)}]", got, remedy))
            (grad,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach().float(), grad.contiguous(memory_format=_format_of(x))

    @contextmanager
    def _plain_mode(self, x: Tensor) -> Iterator[None]:
        """Neither autocast nor inference mode of the caller reaches inside."""
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            remedy = "divide uint8 images by 255"
            raise ValueError(message(self._where, "x", "float images [N, C, H, W]", got, remedy))
        with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):
            yield

    def _run(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32).contiguous(memory_format=self._memory_format)
        if self._forward is None:
            with isolated_rng(0):  # a model that draws in eval mode draws the same after it, whenever it is prepared
                self._forward = self._prepare(x.detach()[:_PROBE])
        return logits_of(self._where, self._forward(x), len(x)).float()

    def _prepare(self, probe: Tensor) -> Callable[[Tensor], Any]:
        if self._source is None:
            raise RuntimeError(message(self._where, "self", "an open model", "one that was closed", "open another"))
        network = self._source
        with first_pass(self._where, probe), torch.no_grad():
            network(probe)
        silence_hooks(network, lambda: logits_of(self._where, network(probe), len(probe)))
        if self._fold and len(probe):
            network, self.report = fold(network, probe)
        network.to(memory_format=self._memory_format)  # type: ignore[call-overload]
        if self.precision == "bf16":
            network = InBfloat16(network)
        if not self._compile and len(probe):
            network = _for_device(network, probe, self.device)
        self._source = network
        return torch.compile(network, dynamic=False) if self._compile else network


def _frozen_copy(
    where: str,
    model: nn.Module,
    normalize: tuple[float | Sequence[float], float | Sequence[float]] | None,
    device: torch.device,
) -> nn.Module:
    with torch.inference_mode(False), torch.no_grad():
        try:
            work = copy.deepcopy(model)
        except Exception as error:  # whatever a module's own __deepcopy__ may raise
            got, remedy = f"{type(error).__name__}: {error}", "give it tensors and modules that can be copied"
            expected = "a model that copy.deepcopy can copy"
            raise ValueError(message(where, "model", expected, got, remedy)) from error
        scale = statistics(where, normalize)
        work = (work if scale is None else normalized(work, *scale)).to(device, torch.float32).eval()
        for p in work.parameters():
            p.grad = None
            p.requires_grad_(False)
    return work


def _for_device(network: nn.Module, probe: Tensor, device: torch.device) -> nn.Module:
    """Layers that suit a GPU, where the network's graph is known, or a CPU."""
    if isinstance(network, InBfloat16):
        network.network = _for_device(network.network, network.entering(probe), device)
        return network
    if device.type == "cpu":
        return for_cpu(network, probe)[0]
    return for_gpu(network, probe)[0] if device.type == "cuda" and isinstance(network, fx.GraphModule) else network


def _format_of(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
