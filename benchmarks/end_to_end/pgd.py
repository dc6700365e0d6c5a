"""PGD-10 over 50,000 images, ResNet18: the engine, the best loop with torch.compile, and whole scores.

Weights and images are random: nothing here depends on what they show.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdfast.attacks import KLScoreConfig, kl_scores
from bdfast.attacks.masked_pgd import MaskedPGD
from bdfast.data.source import to_floats
from bdfast.ops import masked_pgd_step_, masked_random_start, patch_centers
from bdfast.runtime.frozen import FrozenModel
from bdfast.testing.tables import Cell, Table
from benchmarks import scenario, score_advrbd
from benchmarks.stage import Context, Result, Stage

IMAGES, STEPS, BATCH = 50_000, 10, 1024
GOAL_SECONDS, GOAL_RATIO = 3.1, 1.2  # for all images on one H200, after warm-up; against torch.compile
RADIUS, EPS, STEP_SIZE = 8, 8 / 255, 2 / 255
COMPILE_SECONDS = 12.0  # that torch.compile takes where the stage `compile` has been: not begun with less left
ROUNDS = 5

Attack = Callable[[], Tensor]
"""All steps on one batch."""


@dataclass(frozen=True)
class Batch:
    """What every loop is given: images [N, C, H, W] in [0, 1], their ids and the logits on them."""

    x: Tensor
    ids: Tensor
    target: Tensor
    steps: int


def run(context: Context) -> Result:
    """Time both loops on one batch, taking turns, then the scores of a whole set."""
    quick = context.quick
    images, labels, _ = score_advrbd.pixels(None, 16 if quick else IMAGES)
    architecture = "mobilenet_v2" if quick else "resnet18"
    model = score_advrbd.network(architecture, None, images, context.device)
    size, steps = (8, 1) if quick else (BATCH, STEPS)
    result: Result = {"network": architecture, "batch": size, "steps": steps, "images": IMAGES}
    result |= {"goal_seconds": GOAL_SECONDS, "goal_ratio": GOAL_RATIO, "seconds": {}}
    with FrozenModel(model, _precision(context)) as frozen:
        x = to_floats(images[:size], torch.zeros(0, device=context.device))
        batch = Batch(x, torch.arange(size, device=context.device), frozen.logits(x), steps)
        loops = {"engine": _engine(frozen, batch)}
        _time(loops, result, context)
        if context.seconds_left > COMPILE_SECONDS and not quick:
            loops["torch.compile"] = _compiled(model, batch)
            _time(loops, result, context)
    config = KLScoreConfig(steps=steps, precision=_precision(context), batch_size=size)
    for name in ("kl_scores, cold", "kl_scores"):
        began = time.perf_counter()
        kl_scores(model, (images, labels), config)
        result["seconds"][name] = round((time.perf_counter() - began) * IMAGES / len(images), 3)
        context.save(result)
    return result


def compile_loop(device: torch.device) -> None:
    """Put the code of the compiled loop into the caches."""
    images, _, _ = score_advrbd.pixels(None, BATCH)
    model = score_advrbd.network("resnet18", None, images, device)
    x = to_floats(images, torch.zeros(0, device=device))
    with torch.no_grad():
        target = model(x)
    _compiled(model, Batch(x, torch.arange(BATCH, device=device), target, steps=1))()


def _precision(context: Context) -> Any:
    return "bf16" if context.device.type == "cuda" else "fp32"


def _time(loops: dict[str, Attack], result: Result, context: Context) -> None:
    """Medians over rounds in which all loops take turns, scaled to all images."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(-3, 1 if context.quick else ROUNDS):  # the first three warm up
        for name, loop in loops.items():
            scenario.synchronize(context.device)
            began = time.perf_counter()
            loop()
            scenario.synchronize(context.device)
            if turn >= 0:
                times[name].append(time.perf_counter() - began)
    scale = IMAGES / result["batch"]
    result["seconds"] |= {name: round(scale * statistics.median(values), 3) for name, values in times.items()}
    if "torch.compile" in times:
        pairs = zip(times["torch.compile"], times["engine"], strict=True)
        result["times_engine"] = round(statistics.median(theirs / ours for theirs, ours in pairs), 3)
    context.save(result)


def _engine(frozen: FrozenModel, batch: Batch) -> Attack:
    attack = MaskedPGD(frozen, radius=RADIUS, steps=batch.steps, step_size=STEP_SIZE, eps=EPS)
    return lambda: attack(batch.x, batch.ids, batch.target, seed=0)


def _compiled(model: nn.Module, batch: Batch) -> Attack:
    """Forward and backward compiled, bfloat16, channels_last, frozen weights; patches and steps as the engine's."""
    network = copy.deepcopy(model).eval().requires_grad_(False)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    clean = batch.target.softmax(1)

    def loss(x_adv: Tensor) -> Tensor:
        with torch.autocast(x_adv.device.type, torch.bfloat16):
            logits = network(x_adv.contiguous(memory_format=torch.channels_last))
        return F.kl_div(logits.float().log_softmax(1), clean, reduction="sum")

    compiled = torch.compile(loss, dynamic=False)

    def attack() -> Tensor:
        centers = patch_centers(batch.ids, *batch.x.shape[2:], seed=0)
        x_adv = masked_random_start(batch.x, batch.ids, centers, RADIUS, eps=EPS, seed=0)
        for _ in range(batch.steps):
            (grad,) = torch.autograd.grad(compiled(x_adv.requires_grad_()), x_adv)
            x_adv = x_adv.detach()
            masked_pgd_step_(x_adv, batch.x, grad, centers, RADIUS, step_size=STEP_SIZE, eps=EPS)
        return x_adv

    return attack


def table(result: Result) -> Table:
    """A line a loop."""
    seconds = result["seconds"]
    lines: list[list[Cell]] = [
        [result["network"], result["batch"], name, value, round(value / seconds["engine"], 2)]
        for name, value in seconds.items()
    ]
    return ("network", "batch", "loop", f"s for {result['images']:,} images", "times engine"), lines


STAGE = Stage("pgd", f"{IMAGES:,} images x PGD-{STEPS}, ResNet18", 35.0, run, table)
