# ruff: noqa: E402  (the path comes first)
"""AdvrBD's scores of a data set: the engine against two loops that people write, side by side, slice by slice.

    python benchmarks/score_advrbd.py --images 320 --threads 2        prints a table
    python benchmarks/score_advrbd.py --model victim.safetensors --save    benchmarks/results/score_advrbd.json

``careful`` is batched, in eval mode, with frozen weights and autograd to the input alone; ``common`` calls
``loss.backward()`` through everything. All take the same patches and starts, and batches of one size. Every slice goes
through every variant before the next one comes, so that what else the machine does meets all alike; a ratio is the
median over slices. Without CIFAR-10 (BDFAST_DATA) images are random, without --model weights are: the times are the
same, how well bf16 agrees says nothing then.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bdfast
from bdfast.attacks.kl_parity import compare, plain_scores
from bdfast.attacks.kl_scores import KLScoreConfig, KLScorer
from bdfast.data.source import Source, to_floats
from bdfast.ops import masked_pgd_step_, masked_random_start, patch_centers
from bdfast.runtime.checkpoints import load_into, load_state
from bdfast.testing.tables import Table, text_table
from benchmarks import environment

Variant = Callable[[Tensor], Tensor]
"""Ids of a slice to scores."""

GOALS = {  # on a CPU with two threads, against (careful, common)
    "engine fp32": (1.15, 1.5),
    "engine bf16": (1.6, 2.2),
}
OVERLAP_GOALS = {"engine fp32": 0.999, "engine bf16": 0.95}
SHARE = 0.05  # gamma, of the samples that are selected


def common_scores(model: nn.Module, source: Source, ids: Tensor, config: KLScoreConfig) -> Tensor:
    """Scores ``[M]``; gradients of all weights are computed on the way, and thrown away."""
    place = next(model.parameters()).detach().flatten()[:0]
    x = to_floats(source.read(ids)[0], place)
    centers = patch_centers(ids.to(x.device), *x.shape[2:], seed=config.seed, round=config.round)
    radius = config.radius_of(*x.shape[2:])
    x_adv = masked_random_start(
        x, ids.to(x.device), centers, radius, eps=config.eps, seed=config.seed, round=config.round
    )  # fmt: skip
    clean = model(x).softmax(1).detach()
    for _ in range(config.steps):
        x_adv.requires_grad_(True)
        model.zero_grad()
        F.kl_div(model(x_adv).log_softmax(1), clean, reduction="sum").backward()
        grad = x_adv.grad
        assert grad is not None
        x_adv = x_adv.detach()
        masked_pgd_step_(x_adv, x, grad, centers, radius, step_size=config.step_size, eps=config.eps)
    with torch.no_grad():
        return F.kl_div(model(x_adv).log_softmax(1), clean, reduction="none").sum(1).cpu()


def engine(stack: ExitStack, model: nn.Module, source: Source, config: KLScoreConfig, batch: int) -> Variant:
    """The scorer of :func:`bdfast.attacks.kl_scores`, opened once."""
    scorer = KLScorer(stack, model, config, None, next(model.parameters()).device)

    def run(ids: Tensor) -> Tensor:
        return scorer.chunk(*source.read(ids), ids, batch)["score"]

    return run


def measure(
    model: nn.Module,
    source: Source,
    config: KLScoreConfig,
    *,
    images: int,
    batch: int,
    deadline: float = float("inf"),
    save: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Times and scores of all variants, on slices of one batch, until the deadline; ``save`` gets what there is so far.

    At least one slice is run.
    """
    device = next(model.parameters()).device
    weights_too = copy.deepcopy(model).eval().requires_grad_(True)
    times: dict[str, list[float]] = {}
    scores: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        variants: dict[str, Variant] = {
            "careful": lambda ids: plain_scores(model, source, ids, config, batch_size=batch),
            "common": lambda ids: common_scores(weights_too, source, ids, config),
            "engine fp32": engine(stack, model, source, config, batch),
            "engine bf16": engine(stack, model, source, replace(config, precision="bf16"), batch),
        }
        names = list(variants)
        for name in names:  # warm up: weights are folded and packed, graphs captured
            variants[name](torch.arange(batch if device.type == "cuda" else min(8, batch)))
        result: dict[str, Any] = {}
        for turn, start in enumerate(range(0, images - batch + 1, batch)):
            if result and time.monotonic() > deadline:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                _wait(device)
                began = time.perf_counter()
                found = variants[name](torch.arange(start, start + batch))
                _wait(device)
                times.setdefault(name, []).append(time.perf_counter() - began)
                scores.setdefault(name, []).append(found)
            result = _result(times, {name: torch.cat(parts) for name, parts in scores.items()}, batch, config)
            save(result)
    return result


def _result(
    times: dict[str, list[float]], scores: dict[str, Tensor], batch: int, config: KLScoreConfig
) -> dict[str, Any]:
    samples = len(scores["careful"])
    top = max(1, round(SHARE * samples))
    # Those that a bf16 run scores again: the time of so many more samples in fp32.
    again = scores["engine bf16"].topk(round(config.rescore * samples)).indices
    rescored = scores["engine bf16"].clone()
    rescored[again] = scores["engine fp32"][again]
    scores = {**scores, "engine bf16, as found": scores["engine bf16"], "engine bf16": rescored}
    extra = config.rescore
    times = {
        **times,
        "engine bf16, as found": times["engine bf16"],
        "engine bf16": [
            b + extra * f for b, f in zip(times["engine bf16"], times["engine fp32"], strict=True)
        ],
    }  # fmt: skip
    variants = {}
    for name in ("common", "careful", "engine fp32", "engine bf16", "engine bf16, as found"):
        variants[name] = {
            "ms_per_image": round(1e3 * statistics.median(times[name]) / batch, 3),
            "times_careful": _ratio(times["careful"], times[name]),
            "times_common": _ratio(times["common"], times[name]),
            **asdict(compare(scores[name], scores["careful"], top)),
        }
    return {"samples": samples, "batch": batch, "slices": len(times["careful"]), "variants": variants}


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), 3)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def network(arch: str, weights: str | None, images: Tensor, device: torch.device) -> nn.Module:
    """The checkpoint, or random weights with statistics of batch norm that belong to the images."""
    model = bdfast.models.build(arch, num_classes=10, image_size=tuple(images.shape[2:]), seed=0).to(device)
    if weights is not None:
        load_into(model, load_state(weights).state, weights)
        return model.eval()
    with torch.no_grad():
        for _ in range(10):
            model.train()(to_floats(images[:64], torch.zeros(0, device=device)))
    return model.eval()


def pixels(path: str | None, count: int) -> tuple[Tensor, Tensor, str]:
    """CIFAR-10's training images, or random ones."""
    if path is not None:
        images, labels = bdfast.data.load(path).train
        return images[:count], labels[:count], "CIFAR-10"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 10, "random images"


def table(result: dict[str, Any]) -> Table:
    """A line a variant."""
    header = ("variant", "ms an image", "x careful", "x common", "overlap of top 5 %", "rank correlation")
    rows = [
        [name, v["ms_per_image"], v["times_careful"], v["times_common"], v["overlap"], round(v["rank_correlation"], 4)]
        for name, v in result["variants"].items()
    ]
    return header, rows


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--model", help="checkpoint of a trained network of that architecture")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after so long, with the slices done by then")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/score_advrbd.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    images, labels, about = pixels(os.environ.get("BDFAST_DATA"), options.images)
    model = network(options.arch, options.model, images, device)
    result = measure(
        model,
        Source("score_advrbd", (images, labels)),
        KLScoreConfig(steps=options.steps),
        images=len(images),
        batch=options.batch,
        deadline=time.monotonic() + 60 * options.minutes,
    )
    print(text_table(table(result)))
    trained = options.model is not None
    about = f"{options.arch}, {'trained' if trained else 'random'} weights, {about}, PGD-{options.steps}"
    print(f"\n{about}: {result['samples']} samples, {result['slices']} slices, {torch.get_num_threads()} threads")
    if options.save:
        command = sys.argv if argv is None else ["benchmarks/score_advrbd.py", *argv]
        content = for_file(result, len(images), about, environment.facts(device, command))
        environment.write(environment.RESULTS / "score_advrbd.json", content)


def for_file(result: dict[str, Any], images: int, about: str, facts: dict[str, Any]) -> dict[str, Any]:
    """A result file's content; it is complete when every slice was timed that ``images`` have."""
    return {
        "kind": "score_advrbd",
        "complete": result["slices"] == images // result["batch"],
        "environment": facts,
        "about": about,
        "goals": {"times": GOALS, "overlap": OVERLAP_GOALS},
        **result,
    }


if __name__ == "__main__":
    main()
