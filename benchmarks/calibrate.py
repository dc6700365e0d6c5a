# ruff: noqa: E402  (the path comes first)
"""Calibrating images against the loops people write: seconds for S steps over N images, side by side.

    python benchmarks/calibrate.py                        PreAct-ResNet18, 1,000 random images, 20 steps, 2 threads
    python benchmarks/calibrate.py --images 256 --steps 4 --rounds 3

Slices of the work alternate in one run; a ratio is the median over slices. ``plain`` asks torch.autograd.grad for the
gradient to the images alone, ``common`` calls loss.backward() and so computes weight gradients too. Goals: 1.1 and 1.5
times plain in fp32 and bf16, 1.4 and 2 times common.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bdfast
from bdfast.defenses import Calibrator, GICConfig, calibrator
from bdfast.testing.timing import Timing, interleave
from benchmarks import environment
from benchmarks.scenario import synchronize

GOALS = {"fp32": {"plain": 1.1, "common": 1.4}, "bf16": {"plain": 1.5, "common": 2.0}}
DELTA = 8 / 255


def main(argv: list[str] | None = None) -> int:
    """Time, print and write."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    result = measure(device, options.images, options.batch_size, options.steps, options.rounds)
    result["environment"] = environment.facts(device, sys.argv if argv is None else ["benchmarks/calibrate.py", *argv])
    print(json.dumps({"seconds": result["seconds"], "times": result["times"]}, indent=1))
    path = options.output or environment.RESULTS / f"calibrate_{device.type}.json"
    environment.write(path, result)
    print(f"wrote {path}")
    return 0


def measure(
    device: torch.device, images: int, batch_size: int, steps: int, rounds: int, network: str = "preact_resnet18"
) -> dict[str, Any]:
    """One round calibrates one batch in each way; as many rounds as the images have batches, or ``rounds``."""
    normalize = bdfast.data.normalization("cifar10")
    model = bdfast.models.build(network, num_classes=10, image_size=32, channels=3, normalize=normalize)
    model = model.to(device).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch_size, 3, 32, 32, generator=generator).to(device)
    y = torch.randint(0, 10, (batch_size,), generator=generator).to(device)
    config: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "delta": DELTA}
    ours: dict[str, Calibrator] = {
        precision: calibrator(GICConfig(**config, precision=precision)).fit(model, (x, y))  # type: ignore[arg-type]
        for precision in GOALS
    }
    work: dict[str, Callable[[], object]] = {
        **{name: lambda made=made: made.transform(x, y) for name, made in ours.items()},  # type: ignore[misc]
        "plain": lambda: plain_loop(model, x, y, steps),
        "common": lambda: common_loop(model, x, y, steps),
    }

    def waited(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            step()
            synchronize(device)

        return run

    count = max(rounds, -(-images // batch_size))
    timings = interleave(
        {name: waited(step) for name, step in work.items()}, sample_seconds=0.0, rounds=(count, count), seconds=0.0
    )
    batches = images / batch_size
    return {
        "kind": "calibrate",
        "network": network, "images": images, "batch_size": batch_size, "steps": steps, "rounds": count,
        "seconds": {name: round(t.median * batches, 3) for name, t in timings.items()},
        "times": {name: _times(timings, name) for name in GOALS},
        "difference": {name: _difference(made, model, x, y, steps) for name, made in ours.items()},
        "goals": GOALS,
    }  # fmt: skip


def plain_loop(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """A careful loop: the gradient of the images alone."""
    for p in model.parameters():
        p.requires_grad_(False)
    z = x.clone()
    for _ in range(steps):
        z.requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(model(z), y, reduction="sum"), z)
        z = _stepped(z, x, g)
    return z


def common_loop(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """The usual loop: ``loss.backward()``, which fills the gradients of the weights, too."""
    for p in model.parameters():
        p.requires_grad_(True)
    z = x.clone()
    for _ in range(steps):
        z.requires_grad_()
        model.zero_grad()
        cross_entropy(model(z), y).backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        z = _stepped(z, x, z.grad)
    return z


@torch.no_grad()
def _stepped(z: Tensor, x: Tensor, g: Tensor) -> Tensor:
    moved = z - DELTA / 8 * g.sign()
    return (x + (moved - x).clamp(-DELTA, DELTA)).clamp(0, 1)


def _times(timings: dict[str, Timing], name: str) -> dict[str, float]:
    return {other: round(timings[name].times(timings[other]), 3) for other in ("plain", "common")}


def _difference(made: Calibrator, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, float]:
    """Share of pixels that end elsewhere than by the plain loop, and both mean losses: signs are fragile."""
    theirs, result = plain_loop(model, x, y, steps), made.transform(x, y).images.to(x.device)
    with torch.no_grad():
        losses = [float(cross_entropy(model(z), y)) for z in (x, result, theirs)]
    return {
        "pixels": round(float(((result - theirs).abs() > 1e-4).float().mean()), 5),
        "loss_before": round(losses[0], 5), "loss": round(losses[1], 5), "loss_plain": round(losses[2], 5),
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (2)")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50, help="images a slice (50)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="the fewest slices (5)")
    parser.add_argument("--output", type=Path, help="the result file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
