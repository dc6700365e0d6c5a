"""``bdfast doctor --artefact``: what a file is and claims, and what was refused, without running anything in it.

Status and findings are two things. Status says how far the reading went; a finding is something that no honest file
holds. A file that was read to its end without a finding is a file that was read, no more: whether its model carries a
backdoor is not to be seen there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bdfast.cli.command import DONE, FAILED, FINDING
from bdfast.errors import message, printable
from bdfast.integrations.backdoorbench.converted import MANIFEST, sha256
from bdfast.integrations.backdoorbench.record import ATTACK_RESULT, is_record, read_record
from bdfast.integrations.backdoorbench.stored import KEYS, Fields, StoredRecord, StoredSet
from bdfast.integrations.backdoorbench.weights import build_network
from bdfast.runtime.checkpoints import load_state
from bdfast.untrusted import ArtefactError, read_artefact

WHERE = "bdfast doctor"
NO_FINDING = "no finding; this says how the file is made, not whether its model carries a backdoor"
_STATUS = {"code": "inconclusive", "limit": "inconclusive", "unsupported": "inconclusive", "damaged": "error"}


@dataclass
class Inspection:
    """What was seen.

    Attributes:
        path, sha256, bytes: the file.
        kind: what it is.
        status: "complete": read to its end; "inconclusive": not read to its end; "error": damaged, or missing parts.
        claims: what it says of itself.
        notes: what is worth knowing.
        refused: what was not read, and why.
        findings: what no honest file holds.
    """

    path: str
    sha256: str | None = None
    bytes: int | None = None
    kind: str = "unknown"
    status: Literal["complete", "inconclusive", "error"] = "complete"
    claims: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def inspect(path: Path) -> Inspection:
    """Look into a file, or the folder of a record.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if not path.exists():
        raise FileNotFoundError(
            message(WHERE, "--artefact", "a file or a record", f"{path}: nothing", "check the path")
        )
    found = Inspection(str(path))
    file = path / (MANIFEST if (path / MANIFEST).is_file() else ATTACK_RESULT) if path.is_dir() else path
    if file.is_file():
        found.sha256, found.bytes = sha256(file), file.stat().st_size
    try:
        _look(path, found)
    except ArtefactError as error:
        found.status = _STATUS[error.kind]  # type: ignore[assignment]
        found.refused.append(str(error))
        if error.kind == "code":
            found.findings.append(f"the file asks to run something: {error.field}")
    except (ValueError, TypeError, FileNotFoundError) as error:
        found.status = "error"
        found.refused.append(str(error))
    return found


def _look(path: Path, found: Inspection) -> None:
    if path.suffix == ".safetensors":
        checkpoint = load_state(path)
        found.kind = "safetensors"
        _state(found, checkpoint.state)
        found.claims.update(checkpoint.metadata)
        return
    if path.is_dir():
        found.kind = "a converted record" if (path / MANIFEST).is_file() else "a record of BackdoorBench"
        if not is_record(path):
            expected = f"a folder with {ATTACK_RESULT} or {MANIFEST}"
            raise FileNotFoundError(message(WHERE, "--artefact", expected, str(path), "pass a file in it"))
        _record(path, read_record(path, where=WHERE), found)
        return
    artefact = read_artefact(path, where=WHERE)
    found.kind = f"a file of torch.save ({artefact.kind})"
    value = artefact.value
    if isinstance(value, Mapping) and all(key in value for key in KEYS):
        found.kind = f"BackdoorBench's attack_result ({artefact.kind})"
        _record(path, read_record(path, where=WHERE), found)
    elif isinstance(value, Mapping):
        state = next((value[key] for key in ("model", "state_dict") if isinstance(value.get(key), Mapping)), value)
        _state(found, state)
        found.claims.update({str(key): item for key, item in value.items() if isinstance(item, (str, int, float))})
    else:
        found.claims["value"] = f"a {type(value).__name__}"


def _state(found: Inspection, state: Mapping[Any, Any]) -> None:
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    found.claims["tensors"] = len(tensors)
    found.claims["parameters"] = sum(value.numel() for value in tensors)
    bad = [
        str(key) for key, value in state.items() if isinstance(value, Tensor) and not bool(torch.isfinite(value).all())
    ]
    if bad:
        found.status = "error"
        found.refused.append(f"weights that are not finite: {', '.join(map(printable, bad[:4]))}")


def _record(path: Path, record: StoredRecord, found: Inspection) -> None:
    _state(found, record.state)
    found.claims.update(
        model_name=record.model_name,
        num_classes=record.num_classes,
        clean_data=record.clean_data,
        img_size=list(record.image_shape),
        train=None if record.train is None else _set(record.train),
        test=_set(record.test),
    )
    try:
        found.notes += build_network(Fields(WHERE, path), record)[1]
    except ValueError as error:
        found.status = "inconclusive"
        found.notes.append(str(error))


def _set(part: StoredSet) -> dict[str, int]:
    return {
        "samples": len(part.order),
        "flagged": int(part.flags.sum()),
        "relabelled": int((part.labels != part.original_labels).sum()),
    }


def exit_code(found: Inspection) -> int:
    """1 for a finding, 2 if the file was not read to its end, else 0."""
    if found.findings:
        return FINDING
    return DONE if found.status == "complete" else FAILED


def text(found: Inspection) -> str:
    """The report for people."""
    lines = [found.path, f"  {'what it is':<12} {found.kind}", f"  {'status':<12} {found.status}"]
    if found.sha256 is not None:
        lines += [f"  {'SHA-256':<12} {found.sha256}", f"  {'bytes':<12} {found.bytes}"]
    lines += [f"  {printable(key):<12} {printable(str(value)[:400])}" for key, value in found.claims.items()]
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"refused: {part}" for part in found.refused]
    lines += [f"FINDING: {finding}" for finding in found.findings] or [NO_FINDING]
    return "\n".join(lines)
