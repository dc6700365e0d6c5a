"""``bdfast convert``: a foreign file becomes safetensors, JSON and raw pixels, without running what is in it."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdfast.errors import message, printable
from bdfast.integrations.backdoorbench.converted import MODEL, sha256, write_converted
from bdfast.integrations.backdoorbench.record import ATTACK_RESULT
from bdfast.integrations.backdoorbench.stored import KEYS, Fields, StoredRecord, parse_record, parse_state
from bdfast.integrations.backdoorbench.weights import build_network, without_module
from bdfast.runtime.checkpoints import WRAPPERS, save_state
from bdfast.untrusted import Artefact, Limits, RawImage, read_artefact

WHERE = "convert"


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    unsafe_pickle: str | None = None,
    limits: Limits | None = None,
) -> list[str]:
    """Write what a file of ``torch.save`` holds as files that cannot run anything.

    An ``attack_result.pt`` (or the folder that it lies in) becomes ``model.safetensors``, ``images.bin`` and
    ``manifest.json``, which :func:`load_record` reads; any other file with weights becomes ``model.safetensors``.

    Args:
        path: the file, or the folder of a record.
        out: a folder, made if it is not there.
        unsafe_pickle: the file's SHA-256 (64 hexadecimal digits), which says that you know this very file and that its
            code may run: it is unpickled by torch then, with all that it asks for. Nothing else ever does that.
        limits: what reading may take.

    Returns:
        What is to be said about it, in sentences.

    Raises:
        FileNotFoundError: no such file.
        ArtefactError, LabelRangeError: what is there is refused; the message names file and field.
        ValueError: the file has another SHA-256.
    """
    path, out = Path(path), Path(out)
    file = path / ATTACK_RESULT if path.is_dir() else path
    if unsafe_pickle is None:
        artefact, digest = read_artefact(file, where=WHERE, limits=limits), sha256(file)
    else:
        artefact, digest = _unpickle(file, unsafe_pickle)
    fields = Fields(WHERE, file)
    value = artefact.value
    if isinstance(value, Mapping) and all(key in value for key in KEYS):
        record = parse_record(WHERE, file, value)
        record, notes = _with_own_names(fields, record)
        out.mkdir(parents=True, exist_ok=True)
        write_converted(out, record, source=(file.name, digest), notes=notes)
        return notes
    return _convert_weights(fields, value, out)


def _with_own_names(fields: Fields, record: StoredRecord) -> tuple[StoredRecord, list[str]]:
    """The record with its weights under our names, where the architecture is known."""
    try:
        model, notes = build_network(fields, record)
    except ValueError as error:
        return replace(record, state=without_module(record.state)), [f"the weights keep their names: {error}"]
    return replace(record, state=dict(model.state_dict())), notes


def _convert_weights(fields: Fields, value: Any, out: Path) -> list[str]:
    """A checkpoint: a state dict, or one under a usual name beside plain values."""
    content = fields.mapping(value, "the whole value")
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    state = without_module(parse_state(fields, content if wrapper is None else content[wrapper]))
    others = {} if wrapper is None else {key: item for key, item in content.items() if key != wrapper}
    plain = {key: item for key, item in others.items() if isinstance(key, str) and _is_plain(item)}
    dropped = [printable(str(key)) for key in others if key not in plain]
    out.mkdir(parents=True, exist_ok=True)
    save_state(out / MODEL, state, plain)
    return [f"left out, being no plain values: {', '.join(dropped)}"] if dropped else []


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _unpickle(file: Path, digest: str) -> tuple[Artefact, str]:
    """What a file that its user vouches for holds; the bytes that were hashed are the ones that are unpickled."""
    if not file.is_file():
        raise FileNotFoundError(message(WHERE, str(file), "a file of torch.save", "no such file", "check the path"))
    raw = file.read_bytes()
    actual = hashlib.sha256(raw).hexdigest()
    if digest.lower() != actual:
        remedy = "pass the SHA-256 of a file that you know, or leave the option out"
        raise ValueError(message(WHERE, "unsafe_pickle", "the file's SHA-256", f"{digest!r:.80}", remedy))
    value = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=False)
    return Artefact("unpickled", _neutral(value)), actual


def _neutral(value: Any) -> Any:
    """Unpickled objects in the forms of :func:`read_artefact`."""
    if isinstance(value, Mapping):
        return {_neutral(key): _neutral(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_neutral, value)) if type(value) in (list, tuple) else list(map(_neutral, value))
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "getbands"):  # a Pillow image
        return RawImage(np.atleast_3d(np.asarray(value.convert("L" if value.mode == "1" else value.mode))))
    return value.detach() if isinstance(value, Tensor) else value
