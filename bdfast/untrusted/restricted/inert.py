"""Everything that a pickle may name, as constructors that only keep their arguments.

A pickle builds objects by calling what it names. Here a name is looked up in :data:`ALLOWED` and nowhere else, and what
is called is one of the few functions below: each checks its arguments and returns a record of them. Nothing is imported
by name, no method of a foreign class runs, and what is not listed ends the reading.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from .refused import Refused, quote

TORCH_DTYPES = {  # storage class -> (dtype, bytes a number)
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
NUMPY_DTYPES = {  # numpy's code -> the letter of the struct module
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
    "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip
PIL_MODES = {"1": 0, "L": 1, "LA": 2, "RGB": 3, "RGBA": 4}  # bytes a pixel; mode 1 packs eight pixels into one
MAX_SIDE = 4096  # pixels
MAX_DIMENSIONS = 8


# Plain classes: importing dataclasses would take longer than reading most files, and named tuples would pass for
# the tuples of the file.


class Name:
    """A class that is named but never called: a storage, ``numpy.ndarray``, ``PIL.Image.Image``."""

    def __init__(self, path: str) -> None:
        self.path = path


class Constructor:
    """What stands for a function that the pickle calls."""

    def __init__(self, path: str, call: Callable[[tuple[Any, ...]], Any]) -> None:
        self.path, self.call = path, call


class Ordered(dict[Any, Any]):
    """An OrderedDict; a state dict sets an attribute on it, which is dropped."""


class Dtype:
    """A numpy dtype."""

    def __init__(self, code: str, order: str = "<") -> None:
        self.code, self.order, self.size = code, order, int(code[1:])


class Array:
    """A numpy array; its state may follow after it was made."""

    def __init__(
        self, dtype: Dtype | None = None, shape: tuple[int, ...] = (), fortran: bool = False, data: bytes = b""
    ) -> None:
        self.dtype, self.shape, self.fortran, self.data = dtype, shape, fortran, data


class Image:
    """A Pillow image in memory; its state follows after it was made."""

    def __init__(self) -> None:
        self.mode, self.size = "", (0, 0)
        self.data: bytes | None = None


class Storage:
    """A run of numbers that lies elsewhere in the file."""

    def __init__(self, dtype: str, itemsize: int, key: str, count: int) -> None:
        self.dtype, self.itemsize, self.key, self.count = dtype, itemsize, key, count


class Tensor:
    """A view of a storage."""

    def __init__(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


def wrong(path: str, args: object) -> Refused:
    """Arguments that such an object is never saved with."""
    return Refused(
        "damaged", path, "the arguments that it is saved with", quote(args), "save plain arrays, tensors and numbers"
    )


def check(condition: bool, path: str, args: object) -> None:
    """Refuse unless ``condition``."""
    if not condition:
        raise wrong(path, args)


def whole(value: object) -> bool:
    """An integer of 64 bits that is not negative."""
    return type(value) is int and 0 <= value < 2**63


def wholes(value: object) -> bool:
    """A short tuple of them."""
    return isinstance(value, tuple) and len(value) <= MAX_DIMENSIONS and all(map(whole, value))


def _dtype(args: tuple[Any, ...]) -> Dtype:
    check(bool(args) and isinstance(args[0], str), "numpy.dtype", args)
    order, code = ("<", args[0]) if args[0][:1] not in "<>|=" or not args[0] else (args[0][0], args[0][1:])
    if code not in NUMPY_DTYPES or order not in "<>|":
        got = f"numpy dtype {quote(args[0])}"
        raise Refused("unsupported", "numpy.dtype", "numbers or truth values", got, "save arrays of plain numbers")
    return Dtype(code, order)


def _reconstruct(args: tuple[Any, ...]) -> Array:
    check(len(args) == 3 and args[0] is NDARRAY and wholes(args[1]), "numpy _reconstruct", args)
    return Array()


def _frombuffer(args: tuple[Any, ...]) -> Array:
    check(len(args) == 4 and isinstance(args[0], (bytes, bytearray)) and isinstance(args[1], Dtype), "numpy", args[1:])
    check(wholes(args[2]) and args[3] in ("C", "F"), "numpy _frombuffer", args[1:])
    return Array(args[1], args[2], args[3] == "F", bytes(args[0]))


def _scalar(args: tuple[Any, ...]) -> Any:
    check(len(args) == 2 and isinstance(args[0], Dtype) and isinstance(args[1], bytes), "numpy scalar", args)
    check(len(args[1]) == args[0].size, "numpy scalar", args)
    return struct.unpack(f"{args[0].order.replace('|', '<')}{NUMPY_DTYPES[args[0].code]}", args[1])[0]


def _encode(args: tuple[Any, ...]) -> bytes:
    check(len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1"), "_codecs.encode", args)
    try:
        return bytes(args[0].encode("latin-1"))
    except UnicodeEncodeError:
        raise wrong("_codecs.encode", args[1:]) from None


def _nothing(make: Callable[[], Any], path: str) -> Callable[[tuple[Any, ...]], Any]:
    def call(args: tuple[Any, ...]) -> Any:
        check(args in ((), ([],)), path, args)
        return make()

    return call


def _tensor(args: tuple[Any, ...]) -> Tensor:
    path = "torch._utils._rebuild_tensor"
    check(len(args) >= 4 and isinstance(args[0], Storage), path, args)
    check(whole(args[1]) and wholes(args[2]) and wholes(args[3]) and len(args[2]) == len(args[3]), path, args[1:4])
    return Tensor(args[0], args[1], args[2], args[3])


def _parameter(args: tuple[Any, ...]) -> Tensor:
    check(len(args) >= 2 and isinstance(args[0], Tensor), "torch._utils._rebuild_parameter", args)
    return args[0]  # type: ignore[no-any-return]


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    check(len(args) == 1 and isinstance(args[0], (tuple, list)) and wholes(tuple(args[0])), "torch.Size", args)
    return tuple(args[0])


def _device(args: tuple[Any, ...]) -> str:
    check(1 <= len(args) <= 2 and isinstance(args[0], str), "torch.device", args)
    return ":".join(str(part) for part in args)


NDARRAY = Name("numpy.ndarray")
IMAGES = tuple(
    Name(f"PIL.{path}") for path in ("Image.Image", "PngImagePlugin.PngImageFile", "JpegImagePlugin.JpegImageFile")
)
_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "builtins.bytes": _nothing(bytes, "bytes"),
    "__builtin__.bytes": _nothing(bytes, "bytes"),
    "collections.OrderedDict": _nothing(Ordered, "collections.OrderedDict"),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
}
for _core in ("numpy.core", "numpy._core"):  # the module's name until numpy 1 and since numpy 2
    _CALLS[f"{_core}.multiarray._reconstruct"] = _reconstruct
    _CALLS[f"{_core}.multiarray.scalar"] = _scalar
    _CALLS[f"{_core}.numeric._frombuffer"] = _frombuffer

ALLOWED: dict[str, Name | Constructor] = {path: Constructor(path, call) for path, call in _CALLS.items()}
ALLOWED |= {name.path: name for name in (NDARRAY, *IMAGES, *(Name(f"torch.{kind}") for kind in TORCH_DTYPES))}


def find(module: str, name: str, where: str) -> Name | Constructor:
    """The constructor that stands for a name; every name that is not listed ends the reading."""
    found = ALLOWED.get(f"{module}.{name}")
    if found is None or "." in name:
        raise Refused(
            "code",
            where,
            "arrays, tensors, numbers, text and plain containers",
            f"a reference to `{quote(f'{module}.{name}')[1:-1]}`, which may run code",
            "do not open this file with pickle or torch.load; save plain values instead",
        )
    return found


def make(name: object, args: object, where: str) -> Any:
    """A new object without a constructor (pickle's NEWOBJ): an image, or an ordered mapping."""
    if args == () and any(name is image for image in IMAGES):
        return Image()
    if args == () and name is ALLOWED["collections.OrderedDict"]:
        return Ordered()
    raise Refused("code", where, "an image or a mapping", f"a new object of {quote(name)}", "save plain values")


def set_state(target: object, state: Any, where: str) -> None:
    """Fill in an object (pickle's BUILD)."""
    if isinstance(target, Array) and target.dtype is None:
        _set_array(target, state)
    elif isinstance(target, Dtype):
        check(isinstance(state, tuple) and len(state) >= 2 and state[1] in ("<", ">", "|"), "numpy.dtype", state)
        target.order = state[1]
    elif isinstance(target, Image) and target.data is None:
        _set_image(target, state)
    elif not isinstance(target, Ordered) or not isinstance(state, dict):
        got = f"a state for {quote(type(target).__name__)}"
        raise Refused("code", where, "a state for an array, an image or a state dict", got, "save plain values")


def _set_array(array: Array, state: Any) -> None:
    check(isinstance(state, tuple) and len(state) == 5, "numpy array", type(state).__name__)
    _, shape, dtype, fortran, data = state
    if isinstance(data, str):  # of Python 2: see Machine
        data = _encode((data, "latin1"))
    check(wholes(shape) and isinstance(dtype, Dtype) and isinstance(data, bytes), "numpy array", shape)
    check(isinstance(fortran, bool), "numpy array", fortran)
    array.dtype, array.shape, array.fortran, array.data = dtype, shape, fortran, data


def _set_image(image: Image, state: Any) -> None:
    check(isinstance(state, (list, tuple)) and 5 <= len(state) <= 6, "PIL image", type(state).__name__)
    mode, size, data = state[1], state[2], state[4]
    check(isinstance(size, (tuple, list)) and len(size) == 2 and all(map(whole, size)), "PIL image", size)
    check(isinstance(data, bytes), "PIL image", type(data).__name__)
    if mode not in PIL_MODES:
        expected = f"a mode among {', '.join(PIL_MODES)}"
        raise Refused("unsupported", "PIL image", expected, quote(mode), "convert the images to RGB or L")
    width, height = size
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise Refused("limit", "PIL image", f"sides of 1 to {MAX_SIDE} pixels", f"{width} x {height}", "resize them")
    expected_bytes = (width + 7) // 8 * height if mode == "1" else width * height * PIL_MODES[mode]
    check(len(data) == expected_bytes, "PIL image", f"{len(data)} bytes for {width} x {height} {mode}")
    image.mode, image.size, image.data = mode, (width, height), data
