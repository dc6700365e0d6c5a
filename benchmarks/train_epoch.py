# ruff: noqa: E402  (the path comes first)
"""An epoch of training on CIFAR-10-sized images: bdfast against the loops that people write, in one run.

python benchmarks/train_epoch.py --data FILE          a whole epoch on a GPU
python benchmarks/train_epoch.py --steps 8            a few steps; without --data on random images
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch

import bdfast
from bdfast.testing.tables import text_table
from benchmarks import environment, training_loops
from benchmarks.end_to_end.train import table


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    command = sys.argv if argv is None else ["benchmarks/train_epoch.py", *argv]
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    facts = environment.facts(device, command)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    steps = arguments.steps or (None if device.type == "cuda" else 8)
    count = 50_000 if steps is None else steps * arguments.batch_size
    data = bdfast.data.load(arguments.data).train if arguments.data else training_loops.random_images(count)
    records = []
    for architecture in arguments.models:
        setting = training_loops.setting_for(architecture, device, data, steps, arguments.batch_size)
        records.append(training_loops.measure(setting, arguments.rounds))
        print(text_table(table({"records": records[-1:]})), flush=True)
    path = arguments.output or environment.RESULTS / f"train_epoch_{device.type}_{facts['commit']}.json"
    environment.write(path, {"kind": "train_epoch", "environment": facts, "records": records})
    print(f"\nwrote {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10, a file or folder; none: random images")
    parser.add_argument("--device")
    parser.add_argument("--models", nargs="+", default=["resnet18", "preact_resnet18"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, help="none: all on a GPU, 8 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
