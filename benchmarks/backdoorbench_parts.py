# ruff: noqa: E402  (the path comes first)
"""The accelerated functions for BackdoorBench's defenses, each beside the usual loop, in one run on the CPU.

    python benchmarks/backdoorbench_parts.py                          a table
    python benchmarks/backdoorbench_parts.py --write                  and benchmarks/results/backdoorbench_parts.json
    python benchmarks/backdoorbench_parts.py --parts sau l2 --rounds 5

The usual loops are those that ``BDFAST_REFERENCE=1`` runs: written for this project from the equations. Random images
and a PreAct-ResNet18 with random weights: what is timed depends on neither.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bdfast
from bdfast.integrations.backdoorbench.accelerated import abl, clp, entropy, evaluation, nad, npd, sau
from bdfast.testing.tables import Table, text_table
from bdfast.testing.timing import Timing, host_clock
from benchmarks import environment

Step = Callable[[], Any]
CALLS = 10  # of a short part, in a row: a sample
CPU = SimpleNamespace(device="cpu")


@dataclass(frozen=True)
class Part:
    """A function, its work, the two ways to do it, and the ratio to reach."""

    name: str
    work: str
    goal: float
    make: Callable[[argparse.Namespace], tuple[Step, Step]]  # (usual, ours)
    weight: int  # how many times fewer rounds than of a short part


def main(argv: list[str] | None = None) -> int:
    """Time the parts; 0 when every goal is reached, else 1."""
    command = sys.argv if argv is None else ["benchmarks/backdoorbench_parts.py", *argv]
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    records = []
    for part in PARTS:
        if part.name in arguments.parts:
            records.append(measure(part, arguments))
            print(f"{part.name}: {records[-1]['ratio']:.3g}", file=sys.stderr, flush=True)
    print(text_table(table(records)))
    if arguments.write:
        result = {
            "kind": "backdoorbench_parts",
            "complete": len(arguments.parts) == len(PARTS),
            "environment": environment.facts(torch.device("cpu"), command),
            "settings": {name: getattr(arguments, name) for name in ("images", "thresholds", "threads", "rounds")},
            "records": records,
        }
        environment.write(arguments.output, result)
        print(f"\nwrote {arguments.output}")
    return 0 if all(record["ratio"] >= record["goal"] for record in records) else 1


def measure(part: Part, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turn; the ratio is the median over rounds."""
    torch.manual_seed(0)
    usual, ours = part.make(arguments)
    ours()  # what is allocated and looked up once
    calls = CALLS if part.weight == 1 else 1
    rounds = max(1, arguments.rounds // part.weight)
    samples = [(host_clock(usual, calls), host_clock(ours, calls)) for _ in range(rounds)]
    timings = [Timing(column, calls) for column in zip(*samples, strict=True)]
    work = part.work.format(**vars(arguments))
    return {"part": part.name, "work": work, "goal": part.goal, **_record(*timings)}


def _record(usual: Timing, ours: Timing) -> dict[str, Any]:
    return {"ratio": round(ours.times(usual), 3), "usual": usual.record(), "ours": ours.record()}


def table(records: list[dict[str, Any]]) -> Table:
    """A line a part."""
    header = ("part", "work", "usual ms", "ours ms", "times as fast", "goal", "rounds")
    rows = [
        (
            r["part"], r["work"], r["usual"]["us"] / 1e3, r["ours"]["us"] / 1e3, r["ratio"], r["goal"],
            r["ours"]["rounds"],
        )
        for r in records
    ]  # fmt: skip
    return header, rows


# --- the parts -------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    """In eval mode, with batch norms that are no identities."""
    net = bdfast.models.build("preact_resnet18", num_classes=10, image_size=(32, 32))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


def triggered(count: int) -> TensorDataset:
    """5-tuples, as BackdoorBench's data sets yield them."""
    labels = torch.randint(1, 10, (count,))
    return TensorDataset(
        torch.rand(count, 3, 32, 32), torch.zeros_like(labels), torch.arange(count), torch.ones(count), labels
    )


def ranking(arguments: argparse.Namespace) -> tuple[Step, Step]:
    """ABL's isolation order."""
    net, data = network(), triggered(arguments.images)
    return (
        partial(abl.plain_compute_loss_value, CPU, data, net),
        partial(abl.compute_loss_value, CPU, data, net),
    )


def sweep(arguments: argparse.Namespace) -> tuple[Step, Step]:
    """CLP at every threshold, each on a copy, as its script does; nothing is kept from the sweep before."""
    net = network()
    thresholds = [10 * i / (arguments.thresholds - 1) for i in range(arguments.thresholds)]

    def prune_all(prune: Callable[[nn.Module, float], None]) -> None:
        clp.clear_cache()
        for u in thresholds:
            prune(copy.deepcopy(net), u)

    return partial(prune_all, clp.plain_CLP_prune), partial(prune_all, clp.CLP_prune)


def sweep_at_once(arguments: argparse.Namespace) -> tuple[Step, Step]:
    """The same channels, by the function that is there for a sweep."""
    usual, _ = sweep(arguments)
    net = network()
    thresholds = [10 * i / (arguments.thresholds - 1) for i in range(arguments.thresholds)]

    def ours() -> None:
        clp.clear_cache()
        clp.clp_sweep(net, thresholds)

    return usual, ours


def entropies(arguments: argparse.Namespace) -> tuple[Step, Step]:
    """EP's measure of a layer of 256 channels over 512 samples."""
    x = torch.randn(256, 512)
    z = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return partial(entropy.plain_batch_entropy, z), partial(entropy.batch_entropy, z)


def attack(arguments: argparse.Namespace) -> tuple[Step, Step]:
    """SAU's inner loop on a batch; one that does not stop early."""
    model, reference = network(), network()
    images = torch.rand(32, 3, 32, 32)
    labels = model(images).argmax(1)
    attacker = sau.Shared_PGD(model, reference, step_size=0.01, init_type="zero")

    def usual() -> None:
        sau.plain_steps(attacker, images, labels, torch.zeros_like(images))

    return usual, partial(attacker.attack, images, labels)


def projections(norm: str, arguments: argparse.Namespace) -> tuple[Step, Step]:
    """A batch of perturbations outside a ball that shrinks with every call, so that all are scaled each time."""

    def step(function: Callable[[Any, Tensor, Any], Tensor]) -> Step:
        pert = torch.randn(256, 3, 32, 32)
        args = SimpleNamespace(norm_type=norm, trigger_norm=1.0)

        def project() -> None:
            args.trigger_norm *= 0.99
            function(None, pert, args)

        return project

    return step(npd.plain_projection), step(npd.projection)


def attention(arguments: argparse.Namespace) -> tuple[Step, Step]:
    """NAD's map of a stage, forward and backward."""
    features = torch.randn(64, 256, 16, 16, requires_grad=True)
    grad = torch.randn(64, 1, 16, 16)

    def both(function: Callable[..., Tensor]) -> None:
        torch.autograd.grad(function(SimpleNamespace(p=2), features), features, grad)

    return partial(both, nad.plain_attention_map), partial(both, nad.attention_map)


def rates(arguments: argparse.Namespace) -> tuple[Step, Step]:
    """ASR and RA of a triggered set: two passes, or one."""
    net, data = network(), triggered(arguments.images)
    loader = DataLoader(data, batch_size=100)
    swapped = DataLoader(TensorDataset(*(data.tensors[i] for i in (0, 4, 2, 3, 1))), batch_size=100)
    criterion = nn.CrossEntropyLoss()

    def usual() -> None:
        for one in (loader, swapped):
            evaluation.plain_given_dataloader_test(net, one, criterion)

    return usual, partial(evaluation.given_dataloader_test_asr_ra, net, loader, criterion)


PARTS = (
    Part("abl", "loss ranking of {images} images, PreAct-ResNet18", 1.6, ranking, 10),
    Part("clp", "{thresholds} calls of CLP_prune, PreAct-ResNet18", 1.0, sweep, 6),
    Part("clp-sweep", "clp_sweep of {thresholds} thresholds, PreAct-ResNet18", 50.0, sweep_at_once, 6),
    Part("entropy", "256 channels x 512 samples", 20.0, entropies, 1),
    Part("sau", "5 steps, 32 images, two PreAct-ResNet18", 1.5, attack, 10),
    Part("l1", "256 perturbations of 3 x 32 x 32", 20.0, partial(projections, "L1"), 1),
    Part("l2", "256 perturbations of 3 x 32 x 32", 20.0, partial(projections, "L2"), 1),
    Part("nad", "attention map of 64 x 256 x 16 x 16, both ways", 1.0, attention, 1),
    Part("evaluation", "ASR and RA of {images} images, PreAct-ResNet18", 1.8, rates, 10),
)


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--images", type=int, default=300, help="of the ranking and the evaluation (300)")
    parser.add_argument("--thresholds", type=int, default=21, help="of CLP's sweep (21)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--rounds", type=int, default=30, help="of short parts; long ones run fewer (30)")
    parser.add_argument("--write", action="store_true", help="write the result file")
    parser.add_argument("--output", type=Path, default=environment.RESULTS / "backdoorbench_parts.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
