# ruff: noqa: E402  (the path comes first)
"""An epoch of PAD-FT's bound optimisation beside the loop that a user would write, in one run.

    python benchmarks/pad_ft_bounds.py                    prints ratios
    python benchmarks/pad_ft_bounds.py --save             and writes benchmarks/results/pad_ft_bounds_<device>.json

The usual loop computes the logits without bounds again in every step, and leaves the gradients of the weights on.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bdfast
from bdfast.defenses import PadFTConfig
from bdfast.defenses.pad_ft.bounds import fit_bounds, frozen_copy, predict
from bdfast.nn import clip_activations
from bdfast.runtime.precision import Autocast, Precision
from bdfast.runtime.resident import ResidentData
from bdfast.testing.tables import Table, text_table
from bdfast.testing.timing import Clock, Step, host_clock, interleave
from benchmarks import environment
from benchmarks.scenario import synchronize

GOAL = 3.0
LAM, LR, BOUND = 0.5, 0.1, 8.0


def main(argv: list[str] | None = None) -> int:
    """Time them in turn, and print the medians of the ratios."""
    command = sys.argv if argv is None else ["benchmarks/pad_ft_bounds.py", *argv]
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    network = bdfast.models.build(arguments.model, num_classes=10, image_size=32, seed=0).to(device).eval()
    data = random_images(arguments.images, device)
    runs: dict[str, Callable[[], None]] = {
        "usual loop": usual_epoch(network, data, arguments.batch_size),
        "bdfast fp32": our_epoch(network, data, arguments.batch_size, "fp32"),
        "bdfast bf16": our_epoch(network, data, arguments.batch_size, "bf16"),
    }
    rounds = (arguments.rounds, arguments.rounds)
    timings = interleave(runs, clock=wall_clock(device), rounds=rounds)
    records = [
        {"name": name, **timing.record(), "ratio": round(timing.times(timings["usual loop"]), 3)}
        for name, timing in timings.items()
    ]
    print(text_table(table(records)))
    if arguments.save:
        path = environment.RESULTS / f"pad_ft_bounds_{device.type}.json"
        settings = {name: getattr(arguments, name) for name in ("model", "images", "batch_size", "threads", "rounds")}
        facts = environment.facts(device, command)
        environment.write(
            path, {"kind": "pad_ft_bounds", "environment": facts, **settings, "goal": GOAL, "records": records}
        )
        print(f"\nwrote {path}")
    return 0


def random_images(count: int, device: torch.device) -> ResidentData:
    """CIFAR's shape; what they show changes nothing here."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return ResidentData(images, torch.randint(0, 10, (count,), generator=generator), device=device)


def usual_epoch(network: nn.Module, data: ResidentData, batch_size: int) -> Callable[[], None]:
    """Plain PyTorch: a second forward for the target, and a backward through everything."""
    unclipped, clipped, bounds = _networks(network, fuse=False)
    for p in clipped.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(bounds, lr=LR)

    def epoch() -> None:
        correct = 0.0
        for x, y, _ in data.batches(batch_size, shuffle=True, epoch_seed=0):
            with torch.no_grad():
                target = unclipped(x)
            with bdfast.backend("reference"):
                logits = clipped(x)
                loss = F.mse_loss(logits, target) + LAM * torch.stack([z.norm() for z in bounds]).sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            correct += (logits.argmax(1) == y).sum().item()

    return epoch


def our_epoch(network: nn.Module, data: ResidentData, batch_size: int, precision: Precision) -> Callable[[], None]:
    """What :func:`bdfast.defenses.pad_ft` does in an epoch of step 2."""
    _, clipped, bounds = _networks(network, fuse=True)
    named: dict[str, Tensor] = {str(i): z for i, z in enumerate(bounds)}
    example, _, _ = next(iter(data.batches(2, shuffle=False, epoch_seed=0)))
    forward = Autocast(frozen_copy(clipped, named, example), precision)
    for p in network.parameters():
        p.requires_grad_(False)
    reference = predict(forward, data, batch_size)
    config = PadFTConfig(clip_epochs=1, clip_batch_size=batch_size, lam=LAM, clip_lr=LR, precision=precision)

    def epoch() -> None:
        for _ in fit_bounds(forward, named, data, reference, None, config):
            pass

    return epoch


def _networks(network: nn.Module, *, fuse: bool) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    copied = copy.deepcopy(network)
    for p in copied.parameters():
        p.requires_grad_(False)
    clipped = clip_activations(copied, "stage-relu", bound=BOUND, fuse=fuse)
    bounds: list[Tensor] = [z.requires_grad_() for z in clipped.bounds.values()]
    return network, clipped, bounds


def wall_clock(device: torch.device) -> Clock:
    """Seconds until the device is done, too."""

    def clock(step: Step, calls: int) -> float:
        def finished() -> None:
            step()
            synchronize(device)

        synchronize(device)
        return host_clock(finished, calls)

    return clock


def table(records: list[dict[str, Any]]) -> Table:
    """A line a run."""
    lines = [[r["name"], f"{r['us'] / 1e3:.0f}", f"{r['ratio']:.2f}"] for r in records]
    return ["", "ms an epoch", "times as fast as usual"], lines


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="preact_resnet18", help="architecture (preact_resnet18)")
    parser.add_argument("--images", type=int, default=200, help="the selected samples (200)")
    parser.add_argument("--batch-size", type=int, default=100, help="of a step (100)")
    parser.add_argument("--rounds", type=int, default=7, help="timed epochs of each (7)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", action="store_true", help="write the result file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
