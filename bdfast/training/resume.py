"""A run that can be taken up again: its state in one file, written after every epoch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from bdfast.errors import message
from bdfast.files import atomic_write
from bdfast.runtime.checkpoints import load_plain
from bdfast.runtime.progress import Record
from bdfast.runtime.ranks import ALONE, Ranks

FORMAT = "bdfast.training/2"
_EXPECTED, _REMEDY = "a checkpoint of this very run", "take another path, or remove the file to start afresh"


def fingerprint(where: str, config: Any, tensors: Iterable[Tensor], ranks: int = 1) -> str:
    """What tells one run from another: the function, its config, its processes, and the bits that it starts from.

    Example:
        >>> from bdfast.training import TrainConfig
        >>> a, b = (fingerprint("example", TrainConfig(seed=seed), [torch.ones(2)]) for seed in (0, 1))
        >>> len(a), a == b
        (64, False)
    """
    digest = hashlib.sha256(json.dumps([where, asdict(config), ranks]).encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{list(plain.shape)}".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()


def save(
    path: str | os.PathLike[str],
    run: str,
    history: list[Record],
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> None:
    """Write the state after an epoch, on rank 0; a reader sees the old file or the new one, never a part."""
    states = ranks.gather(_rng_states(device))
    content = {
        "format": FORMAT,
        "run": run,
        "history": history,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": states,
    }

    def write() -> None:
        with atomic_write(path, "wb") as file:
            torch.save(content, file)

    ranks.share(write)


def _rng_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def load(
    path: str | os.PathLike[str],
    run: str,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> list[Record]:
    """Put everything back as it was after the last saved epoch, and return its history; [] if there is no file.

    Rank 0 reads the file, for all.

    Raises:
        ValueError: the file is damaged, or belongs to another run.
    """
    content = ranks.share(lambda: _read(path, run))
    if content is None:
        return []
    try:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        if content["schedule"].keys() != schedule.state_dict().keys():  # they become attributes, whatever they are
            raise KeyError("schedule")
        schedule.load_state_dict(content["schedule"])
        states = content["rng"][ranks.rank]
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        return list(content["history"])
    except Exception as error:  # parts that are missing, or of another kind
        raise ValueError(message("checkpoint", str(path), _EXPECTED, "a damaged one", _REMEDY)) from error


def _read(path: str | os.PathLike[str], run: str) -> dict[str, Any] | None:
    if not Path(path).exists():
        return None
    try:
        content = load_plain(Path(path))  # never unpickles code
    except Exception as error:  # a damaged file can fail in any way
        got = f"a file that cannot be read ({type(error).__name__})"
        raise ValueError(message("checkpoint", str(path), _EXPECTED, got, _REMEDY)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("run") != run:
        got = "one of another function, config, model or data"
        raise ValueError(message("checkpoint", str(path), _EXPECTED, got, _REMEDY))
    return content
