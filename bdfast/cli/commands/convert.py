"""``bdfast convert``: a foreign file as safetensors, JSON and raw pixels."""

from __future__ import annotations

import argparse

from bdfast.cli.command import DONE, Command
from bdfast.cli.outputs import results_folder
from bdfast.integrations.backdoorbench import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("file", metavar="FILE", help="attack_result.pt, its folder, or a checkpoint of torch.save")
    parser.add_argument("out", metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--unsafe-pickle",
        metavar="SHA256",
        help="the file's SHA-256: you know this very file, and let torch run what is in it",
    )


def run(options: argparse.Namespace) -> int:
    """Convert, and say what is to be said."""
    with results_folder("bdfast convert", options.out, argument="DIR") as folder:
        notes = convert(options.file, folder, unsafe_pickle=options.unsafe_pickle)
    print("".join(f"note: {note}\n" for note in notes), end="")
    print(f"results in {options.out}")
    return DONE


COMMAND = Command(
    name="convert",
    summary="a foreign checkpoint or record as safetensors and JSON, without running its code",
    description=(
        "Read a file of torch.save in a process of its own, without unpickling it, and write what it holds as files\n"
        "that cannot run anything: model.safetensors, and for a record of BackdoorBench images.bin and manifest.json.\n"
        "DIR then serves as --attack-dir or --model of other commands. A file that asks to run something is refused."
    ),
    example=(
        "  bdfast convert record/badnet_0_1/attack_result.pt converted/\n"
        "  bdfast evaluate --model converted/ --data cifar10"
    ),
    add_arguments=add_arguments,
    run=run,
)
