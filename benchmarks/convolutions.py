# ruff: noqa: E402  (the path comes first)
"""3x3 convolutions of a CPU by Winograd's way beside PyTorch's, alone and in networks, in one run.

    python benchmarks/convolutions.py                    prints ratios
    python benchmarks/convolutions.py --save             and writes benchmarks/results/convolutions_cpu.json

Layers are those of a ResNet-18 on images of 32x32 pixels; ``off by`` is the error against float64, relative to the
norm, of PyTorch and of bdfast. Networks: what a frozen one takes forward, and forward and back to the images, and a
step of training, with and without these convolutions; PyTorch's line folds and fuses nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch
import torch.nn.functional as F
from torch import Tensor

import bdfast
from bdfast.runtime import winograd
from bdfast.runtime.frozen import FrozenModel
from bdfast.runtime.ranks import ALONE
from bdfast.runtime.winograd import ConvShape
from bdfast.testing.tables import Table, text_table
from bdfast.testing.timing import Step, interleave
from bdfast.training.parallel import training_forward
from benchmarks import environment

LAYERS = ((64, 32), (128, 16), (256, 8), (512, 4))  # channels in and out, pixels a side
PASSES = ("forward", "to the input", "to the weights")
NETWORKS = ("resnet18", "preact_resnet18", "vgg19_bn")
RECORDS = ("forward", "to the images", "training step")


def main(argv: list[str] | None = None) -> int:
    """Time them in turn, and print the medians of the ratios."""
    command = sys.argv if argv is None else ["benchmarks/convolutions.py", *argv]
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if not winograd.available():
        print("convolutions: this machine, or build, has no such kernel; see `bdfast doctor`", file=sys.stderr)
        return 2
    rounds = (arguments.rounds, arguments.rounds)
    layers = [r for c, size in arguments.layers for r in layer(arguments.images, c, size, rounds)]
    print(text_table(layer_table(layers)))
    networks = [r for name in arguments.networks for r in network(name, arguments.images, rounds)]
    print("\n" + text_table(network_table(networks)))
    if arguments.save:
        settings = {name: getattr(arguments, name) for name in ("images", "threads", "rounds")}
        path = environment.RESULTS / "convolutions_cpu.json"
        facts = environment.facts(torch.device("cpu"), command)
        content = {"kind": "convolutions", "complete": True, "environment": facts, **settings}
        environment.write(path, {**content, "layers": layers, "networks": networks})
        print(f"\nwrote {path}")
    return 0


def layer(images: int, channels: int, size: int, rounds: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """The three passes of a convolution."""
    generator = torch.Generator().manual_seed(0)
    last = torch.channels_last
    x = torch.randn(images, channels, size, size, generator=generator).relu().contiguous(memory_format=last)
    grad = torch.randn(images, channels, size, size, generator=generator).contiguous(memory_format=last)
    weight = torch.randn(channels, channels, 3, 3, generator=generator) * (2 / 9 / channels) ** 0.5
    weight = weight.contiguous(memory_format=last)
    shape = ConvShape(channels, channels, 1)
    there, back = winograd.pack(weight), winograd.pack(weight, gradient=True)
    pairs: dict[str, tuple[Callable[..., Tensor], Callable[[], Tensor]]] = {
        PASSES[0]: (lambda x, w, g: F.conv2d(x, w, padding=1), lambda: winograd.convolve(x, there, shape)),
        PASSES[1]: (lambda x, w, g: _backward(g, x, w, 0), lambda: winograd.convolve(grad, back, shape.turned())),
        PASSES[2]: (lambda x, w, g: _backward(g, x, w, 1), lambda: winograd.weight_gradient(x, grad, weight, shape)),
    }
    for name, (plain, ours) in pairs.items():
        exact = plain(x.double(), weight.double(), grad.double())
        off = [float((y - exact).norm() / exact.norm()) for y in (plain(x, weight, grad), ours())]
        steps: dict[str, Step] = {"pytorch": lambda p=plain: p(x, weight, grad), "bdfast": ours}  # type: ignore[misc]
        timings = interleave(steps, rounds=rounds)
        yield {
            "channels": channels, "size": size, "pass": name,
            **{who: timing.record() for who, timing in timings.items()},
            "ratio": round(timings["bdfast"].times(timings["pytorch"]), 3),
            "off": dict(zip(("pytorch", "bdfast"), off, strict=True)),
        }  # fmt: skip


def _backward(grad: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
    mask = [which == 0, which == 1, False]
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
    )  # fmt: skip
    return found[which]  # type: ignore[no-any-return]


def network(name: str, images: int, rounds: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """A network as PyTorch runs it, and as bdfast does, with and without these convolutions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(images, 3, 32, 32, generator=generator)
    y = torch.randint(10, (images,), generator=generator)
    for record in RECORDS:
        steps: dict[str, Step] = {"pytorch": _plain(name, record, x, y)}
        for who, on in (("without", False), ("bdfast", True)):
            with _convolutions(on):
                steps[who] = _ours(name, record, x, y)
        timings = interleave(steps, rounds=rounds)
        yield {
            "network": name, "what": record, **{who: timing.record() for who, timing in timings.items()},
            "ratio": round(timings["bdfast"].times(timings["pytorch"]), 3),
            "ratio_without": round(timings["bdfast"].times(timings["without"]), 3),
        }  # fmt: skip


def _plain(name: str, record: str, x: Tensor, y: Tensor) -> Step:
    """What a careful user writes: eval mode, the gradient to the images alone."""
    model = bdfast.models.build(name, num_classes=10, image_size=32, seed=0)
    if record == RECORDS[2]:
        return _training(model.train(), model, x, y)
    model.eval().requires_grad_(False)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def gradient() -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)

    return forward if record == RECORDS[0] else gradient


def _ours(name: str, record: str, x: Tensor, y: Tensor) -> Step:
    model = bdfast.models.build(name, num_classes=10, image_size=32, seed=0)
    if record == RECORDS[2]:
        return _training(training_forward(model.train(), ALONE, False), model, x, y)
    frozen = FrozenModel(model)
    frozen.logits(x)  # rewrites the network
    if record == RECORDS[0]:
        return lambda: frozen.logits(x)
    return lambda: frozen.input_gradient(x, lambda logits: F.cross_entropy(logits, y, reduction="none"))


def _training(forward: Callable[[Tensor], Tensor], model: torch.nn.Module, x: Tensor, y: Tensor) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step() -> None:
        loss = F.cross_entropy(forward(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


@contextmanager
def _convolutions(on: bool) -> Iterator[None]:
    """Networks that are rewritten in the block do, or do not, get these convolutions."""
    before = winograd._ENABLED
    winograd._ENABLED = on
    try:
        yield
    finally:
        winograd._ENABLED = before


def layer_table(records: list[dict[str, Any]]) -> Table:
    """A line a layer and pass."""
    header = ["layer", "pass", "PyTorch ms", "ms", "times as fast", "PyTorch off by", "off by"]
    lines = [
        [
            f"{r['channels']} channels, {r['size']}x{r['size']}", r["pass"], f"{r['pytorch']['us'] / 1e3:.1f}",
            f"{r['bdfast']['us'] / 1e3:.1f}", f"{r['ratio']:.2f}", f"{r['off']['pytorch']:.1e}",
            f"{r['off']['bdfast']:.1e}",
        ]
        for r in records
    ]  # fmt: skip
    return header, lines


def network_table(records: list[dict[str, Any]]) -> Table:
    """A line a network and use."""
    header = ["network", "", "PyTorch ms", "ms", "times as fast", "than without these"]
    lines = [
        [
            r["network"], r["what"], f"{r['pytorch']['us'] / 1e3:.0f}", f"{r['bdfast']['us'] / 1e3:.0f}",
            f"{r['ratio']:.2f}", f"{r['ratio_without']:.2f}",
        ]
        for r in records
    ]  # fmt: skip
    return header, lines


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="of a batch (64)")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each (9)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--networks", nargs="*", default=NETWORKS, help="architectures")
    parser.add_argument(
        "--layers", nargs="*", type=_layer, default=LAYERS, help="such as 64x32: channels, pixels a side"
    )
    parser.add_argument("--save", action="store_true", help="write the result file")
    return parser


def _layer(text: str) -> tuple[int, int]:
    channels, size = text.split("x")
    return int(channels), int(size)


if __name__ == "__main__":
    sys.exit(main())
