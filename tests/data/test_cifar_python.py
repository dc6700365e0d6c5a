"""The Python version of CIFAR: the same tensors as from the binary one, and a refusal of whatever else lies there."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import bdfast.data
from bdfast.data.splits import DataSplits
from bdfast.errors import LabelRangeError
from bdfast.untrusted import ArtefactError
from tests.data import python2
from tests.data.conftest import random_pixels
from tests.untrusted.hostile import CALLS, CASES, PROTO, RUNS, pt

WRITERS: dict[str, Callable[[object], bytes]] = {
    "Python 2": python2.dumps,
    **{f"Python 3, protocol {number}": partial(pickle.dumps, protocol=number) for number in (2, 3, 4, 5)},
}
NAMES = [f"class{number}" for number in range(10)]
FINE = [f"fine{number}" for number in range(100)]


def rows(count: int, seed: int) -> NDArray[np.uint8]:
    return random_pixels(count, 3072, seed=seed)


def batch(labels: list[int], seed: int) -> dict[str, Any]:
    """In the order of keys of CIFAR-10's files."""
    names = [f"leptodactylus_s_{number:06}.png" for number in range(len(labels))]
    data = rows(len(labels), seed)
    return {"batch_label": f"training batch {seed} of 5", "labels": labels, "data": data, "filenames": names}


def batch100(coarse: list[int], fine: list[int], seed: int) -> dict[str, Any]:
    names = [f"bos_taurus_s_{number:06}.png" for number in range(len(fine))]
    start = {"filenames": names, "batch_label": "training batch 1 of 1"}
    return {**start, "fine_labels": fine, "coarse_labels": coarse, "data": rows(len(fine), seed)}


def write(folder: Path, files: dict[str, object], dumps: Callable[[object], bytes] = python2.dumps) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_bytes(dumps(value))
    return folder


def cifar10(sizes: tuple[int, ...] = (300, 2, 1, 4, 5), test: int = 3) -> dict[str, object]:
    """More images in the first batch than a byte counts, and more of file names and labels than a short memo."""
    files: dict[str, object] = {
        f"data_batch_{n}": batch([(n + i) % 10 for i in range(size)], n) for n, size in enumerate(sizes, 1)
    }
    files["test_batch"] = batch([9 - i for i in range(test)], 6)
    return {**files, "batches.meta": {"num_cases_per_batch": 10000, "label_names": NAMES, "num_vis": 3072}}


def as_binary(folder: Path, files: dict[str, Any]) -> Path:
    """The same data in the binary version."""
    folder.mkdir()
    for name, content in files.items():
        if "data" in content:
            columns = [content[key] for key in ("labels", "coarse_labels", "fine_labels") if key in content]
            labels = np.array(columns, np.uint8).T
            np.concatenate([labels, content["data"]], axis=1).tofile(folder / f"{name}.bin")
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n")
    return folder


def same(one: DataSplits, other: DataSplits) -> bool:
    pairs = zip((*one.train, *one.test), (*other.train, *other.test), strict=True)
    equal = all(a.dtype == b.dtype and a.is_contiguous() and torch.equal(a, b) for a, b in pairs)
    return equal and one.class_names == other.class_names


@pytest.mark.parametrize("writer", WRITERS)
def test_cifar10_is_that_of_the_binary_version(tmp_path: Path, writer: str) -> None:
    files = cifar10()
    folder = write(tmp_path / "data" / "cifar-10-batches-py", files, WRITERS[writer])
    binary = as_binary(tmp_path / "binary", files)
    assert same(bdfast.data.load(folder.parent), bdfast.data.load(binary))
    options: dict[str, Any] = {"limit": (301, 2), "image_size": 16}
    assert same(bdfast.data.load(folder, **options), bdfast.data.load(binary, **options))


@pytest.mark.parametrize("writer", WRITERS)
def test_cifar100_is_that_of_the_binary_version(tmp_path: Path, writer: str) -> None:
    meta = {"fine_label_names": FINE, "coarse_label_names": [f"coarse{i}" for i in range(20)]}
    files: dict[str, Any] = {"train": batch100([19, 0, 3], [99, 5, 7], 1), "test": batch100([1, 2], [2, 98], 2)}
    write(tmp_path / "cifar-100-python", {**files, "meta": meta}, WRITERS[writer])
    assert same(bdfast.data.load(tmp_path), bdfast.data.load(as_binary(tmp_path / "binary", files)))


def test_what_python_2_wrote_is_what_its_pickles_are(tmp_path: Path) -> None:
    """The writer of these tests: Python 3 reads it as numpy's documentation says it reads old files."""
    value = cifar10()["data_batch_1"]
    read = pickle.loads(python2.dumps(value), encoding="latin1")
    assert isinstance(value, dict)
    assert np.array_equal(read.pop("data"), value.pop("data"))
    assert read == value
    meta = python2.dumps({"num_cases_per_batch": 10000, "label_names": CIFAR10, "num_vis": 3072})
    assert len(meta) == 158  # as the file in the authors' archive


CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_cifar10_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "cifar-10-batches-py", cifar10())
    monkeypatch.setenv("BDFAST_DATA", str(tmp_path))
    assert bdfast.data.load("cifar10").class_names == tuple(NAMES)


def test_columns_first_and_no_names(tmp_path: Path) -> None:
    files = cifar10((3,))
    content = files["data_batch_1"]
    assert isinstance(content, dict)
    expected = torch.from_numpy(content["data"].reshape(3, 3, 32, 32))
    content["data"] = np.asfortranarray(content["data"])
    del files["batches.meta"], content["filenames"], content["batch_label"]
    splits = bdfast.data.load(write(tmp_path, files))
    assert torch.equal(splits.train[0], expected)
    assert splits.class_names == tuple("0123456789")


def broken(**changes: Any) -> dict[str, Any]:
    """A batch with other values; None leaves one out."""
    return {key: value for key, value in {**batch([1, 2], 1), **changes}.items() if value is not None}


BROKEN: dict[str, tuple[str, object, str]] = {
    "no dict": ("data_batch_1", [1], "the whole value` expected a dict, got a list"),
    "no data": ("data_batch_1", broken(data=None), "data` expected a value, got none"),
    "no labels": ("data_batch_1", broken(labels=None), "labels` expected a value, got none"),
    "a batch of CIFAR-100": ("data_batch_1", batch100([1], [2], 1), "labels` expected a value"),
    "a key of its own": (
        "data_batch_1",
        broken(model=1),
        "its keys` expected data and labels, and perhaps",
    ),
    "data in a list": ("data_batch_1", broken(data=[1]), r"a uint8 array \[N, 3072\], got a list"),
    "data of floats": ("data_batch_1", broken(data=np.zeros((2, 3072), np.float32)), r"got float32 \[2, 3072\]"),
    "images of another size": ("data_batch_1", broken(data=np.zeros((2, 3071), np.uint8)), r"got uint8 \[2, 3071\]"),
    "one axis": ("data_batch_1", broken(data=np.zeros(3072, np.uint8)), r"got uint8 \[3072\]"),
    "more labels than images": ("data_batch_1", broken(labels=[1, 2, 3]), "a label for each image, .* 3 for 2 images"),
    "nothing": ("data_batch_1", broken(labels=[], data=np.zeros((0, 3072), np.uint8)), "at least one, got 0 for 0"),
    "a label of text": ("data_batch_1", broken(labels=["1", "2"]), "labels` expected a list of integers"),
    "labels in an array": ("data_batch_1", broken(labels=np.array([1, 2])), "labels` expected a list of integers"),
    "a label that is no class": (
        "test_batch",
        broken(labels=[1, 10]),
        r"classes in \[0, 10\), got 10 at index 1",
    ),
    "a negative label": ("data_batch_1", broken(labels=[-1, 1]), r"expected classes in \[0, 10\), got -1 at index 0"),
    "names in a text": ("batches.meta", {"label_names": "abc"}, "label_names` expected a list of names"),
    "a name without end": ("batches.meta", {"label_names": ["a" * 257] * 10}, "names of 1 to 256 letters"),
    "nine names": ("batches.meta", {"label_names": NAMES[:9]}, "label_names` expected 10 class names, got 9"),
    "no names": ("batches.meta", {"num_vis": 3072}, "label_names` expected a value"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_batch(tmp_path: Path, case: str) -> None:
    name, value, says = BROKEN[case]
    write(tmp_path, {**cifar10((2,)), name: value})
    kind = LabelRangeError if "classes in" in says else ValueError
    with pytest.raises(kind, match=says) as caught:
        bdfast.data.load(tmp_path)
    assert str(caught.value).startswith(f"load: `{tmp_path / name}: ")
    assert "; " in str(caught.value)


@pytest.mark.parametrize("missing", ["test_batch", "data_batch_1"])
def test_missing_file(tmp_path: Path, missing: str) -> None:
    write(tmp_path, cifar10((1, 1)))
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{missing}` expected all files of the Python version"):
        bdfast.data.load(tmp_path)


WHOLE = python2.dumps(batch([1, 2], 1))
DAMAGED = {
    "an empty file": (b"", "1 to"),
    "half": (WHOLE[: len(WHOLE) // 2], "more bytes"),
    "bytes behind it": (WHOLE + b"\0", "one pickle, got 1 bytes behind it"),
    "text of Python 2 that ends too soon": (PROTO + b"T\xff\xff\xff\x7fabc.", "more bytes"),
    "protocol 0": (pickle.dumps({"data": 1}, protocol=0), "a pickle of protocol 2 to 5"),
    "a file of torch.save": (pt(PROTO + b"}."), "a pickle of protocol 2 to 5"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file(tmp_path: Path, case: str) -> None:
    data, says = DAMAGED[case]
    write(tmp_path, cifar10((2,)))
    (tmp_path / "data_batch_1").write_bytes(data)
    with pytest.raises(ArtefactError, match=says):
        bdfast.data.load(tmp_path)


HOSTILE = [title for title, case in CASES.items() if case.says in (RUNS, CALLS)]


def test_nothing_in_a_hostile_file_runs(tmp_path: Path) -> None:
    """The gadgets of the reader's own tests, as batches: in files of torch.save, and their pickles alone."""

    def attempt(number: int) -> str:
        folder = write(tmp_path / str(number), {"test_batch": batch([1], 1)})
        data = CASES[HOSTILE[number]].build(str(folder / "canary"))
        if zipfile.is_zipfile(io.BytesIO(data)):
            data = zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl")
        (folder / "data_batch_1").write_bytes(data)
        try:
            bdfast.data.load(folder)
        except ArtefactError as error:
            return "sings" if (folder / "canary").exists() else str(error)
        return "is read"

    with ThreadPoolExecutor(4) as pool:
        answers = dict(zip(HOSTILE, pool.map(attempt, range(len(HOSTILE))), strict=True))
    assert {title: text for title, text in answers.items() if not text.startswith("load: `")} == {}
    assert sum(RUNS in text or CALLS in text for text in answers.values()) >= 24


@pytest.mark.parametrize("opcode", [b"R", b"\x81", b"b"], ids=["REDUCE", "NEWOBJ", "BUILD"])
def test_texts_of_python_2_call_nothing(tmp_path: Path, opcode: bytes) -> None:
    command = f"touch {tmp_path / 'canary'}".encode()
    body = b"cposix\nsystem\n(U" + bytes([len(command)]) + command + b"t" + opcode + b"."
    write(tmp_path, cifar10((2,)))
    (tmp_path / "data_batch_1").write_bytes(PROTO + body)
    with pytest.raises(ArtefactError, match=r"posix.system`, which may run code; do not open") as caught:
        bdfast.data.load(tmp_path)
    assert caught.value.kind == "code"
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("key", [python2.dumps([1])[2:-1], b"\x88", b"C\x04data"], ids=["list", "True", "bytes"])
def test_keys_that_are_no_text(tmp_path: Path, key: bytes) -> None:
    write(tmp_path, cifar10((2,)))
    (tmp_path / "data_batch_1").write_bytes(PROTO + b"}" + key + b"K\x01s.")
    with pytest.raises(ArtefactError, match="text or an integer as a key"):
        bdfast.data.load(tmp_path)
