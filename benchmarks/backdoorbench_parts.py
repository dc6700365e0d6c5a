# ruff: noqa: E402  (the path comes first)
"""The functions put into BackdoorBench's defenses, each beside the usual loop, in one run on the CPU.

    python benchmarks/backdoorbench_parts.py                          a table
    python benchmarks/backdoorbench_parts.py --write                  and benchmarks/results/backdoorbench_parts.json
    python benchmarks/backdoorbench_parts.py --parts abl --images 5000 --rounds 1 --write

The last one measures a part and replaces its record in that file; the others keep theirs, each with its own command,
date and commit. Exit code 1: a goal is missed, or results differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch

from bdfast.errors import message
from bdfast.testing.tables import text_table
from benchmarks import environment
from benchmarks.replaced.part import Sizes, failures, table
from benchmarks.replaced.parts import PARTS

KIND = "backdoorbench_parts"
CPU = torch.device("cpu")


def main(argv: list[str] | None = None) -> int:
    """Measure the parts; 0 when every goal is reached and results agree, else 1; 2 for a file of another machine."""
    command = sys.argv if argv is None else ["benchmarks/backdoorbench_parts.py", *argv]
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    facts = environment.facts(CPU, command)
    try:
        kept = earlier(arguments.output, facts) if arguments.write else []
    except ValueError as error:
        if set(arguments.parts) != {part.name for part in PARTS}:
            print(error, file=sys.stderr)
            return 2
        kept = []  # nothing of it will be left
    sizes = Sizes(images=arguments.images, thresholds=arguments.thresholds)
    measured = {name: facts[name] for name in ("date", "commit", "command")} | {"threads": arguments.threads}
    records = []
    for part in PARTS:
        if part.name in arguments.parts:
            record = part.measure(sizes, CPU, arguments.rounds)
            records.append({**record, "measured": {**measured, "sizes": asdict(sizes)}})
            print(f"{part.name}: {record['ratio']:.3g}", file=sys.stderr, flush=True)
    print(text_table(table(records)))
    if arguments.write:
        environment.write(arguments.output, merged(kept, records, facts))
        print(f"\nwrote {arguments.output}")
    wrong = failures(records)
    print("\n".join(f"FAILED {sentence}" for sentence in wrong), end="\n" if wrong else "")
    missed = any(record["ratio"] < (record["goal"] or 0.0) for record in records)
    return int(missed or bool(wrong))


def earlier(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a result file; none where there is no file.

    Raises:
        ValueError: they were measured on another machine or with other versions: no table may mix them.
    """
    if not path.exists():
        return []
    result = json.loads(path.read_text(encoding="utf-8"))
    here, there = (_comparable(one) for one in (facts, result["environment"]))
    if here != there:
        remedy = "measure all parts, or pass another --output"
        raise ValueError(message("backdoorbench_parts", "--output", f"a result of {here}", str(there), remedy))
    return list(result["records"])


def _comparable(facts: dict[str, Any]) -> dict[str, Any]:
    machine = facts["machine"]
    return {"cpu": machine["cpu"], "cores": machine["cores"], "torch": facts["versions"]["torch"]}


def merged(kept: list[dict[str, Any]], records: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """The result file: what was measured now in the place of what was kept of the same parts, in the order of PARTS."""
    by_name = {record["part"]: record for record in (*kept, *records)}
    names = [part.name for part in PARTS]
    return {
        "kind": KIND,
        "complete": set(names) <= by_name.keys(),
        "environment": facts,
        "records": [by_name[name] for name in names if name in by_name],
    }


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--images", type=int, default=300, help="of rankings and evaluations (300)")
    parser.add_argument("--thresholds", type=int, default=21, help="of CLP's sweep (21)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--rounds", type=int, default=30, help="of short parts; long ones run fewer (30)")
    parser.add_argument("--write", action="store_true", help="write the result file")
    parser.add_argument("--output", type=Path, default=environment.RESULTS / f"{KIND}.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
