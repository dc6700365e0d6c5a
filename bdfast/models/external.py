"""Architectures of torchvision and timm, where these are installed. Weights are never downloaded."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdfast.errors import MissingExtraError, message, optional_import

LIBRARIES = ("torchvision", "timm")  # in the order in which a plain name is looked up

# Vision transformers of the benchmarks see 224 pixels whatever the data set: checkpoints hold them in a
# `Sequential(resize, transformer)`, hence keys such as `1.heads.head.weight`.
RESIZED = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32")
_RESIZED_TO = 224


class Resize(nn.Module):
    """Bilinear resize to a fixed size, antialiased where it shrinks."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C, *size]
        return _resize(images, self.size)

    def extra_repr(self) -> str:
        return f"size={self.size}"


@torch.fx.wrap  # one node of a traced graph: which way is taken depends on the shape
def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    # The antialiased kernel gives the same numbers when enlarging, but its backward is not deterministic on CUDA.
    shrinks = height > size[0] or width > size[1]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=shrinks)


def library_names(library: str) -> list[str]:
    """The classifiers that an installed ``library`` offers; empty where it is not installed."""
    try:
        module = _import(library)
    except MissingExtraError:
        return []
    if library == "torchvision":
        return sorted(module.list_models(module=module))
    return sorted(module.list_models())


def find_library(name: str) -> str | None:
    """The installed library that knows ``name``."""
    return next((library for library in LIBRARIES if name in library_names(library)), None)


def build_external(
    library: str, name: str, *, num_classes: int, image_size: tuple[int, int], channels: int, **options: Any
) -> nn.Module:
    """``name`` of ``library`` with random weights; ``options`` go to the library.

    Raises:
        MissingExtraError: the library is not installed.
        ValueError: it has no such architecture, or pretrained weights were asked for.
    """
    for option in ("weights", "pretrained"):
        if options.pop(option, None):
            remedy = "load a file of yours with bdfast.runtime.checkpoints: nothing is downloaded here"
            raise ValueError(message("build", option, "nothing", "a value", remedy))
    module = _import(library)
    if name not in library_names(library):
        remedy = f"see {'torchvision.models' if library == 'torchvision' else 'timm'}.list_models()"
        raise ValueError(message("build", "name", f"an architecture of {library}", f"{name!r}", remedy))
    builder = _torchvision if library == "torchvision" else _timm
    return builder(module, name, num_classes, image_size, channels, options)


def build_resized(name: str, *, num_classes: int, channels: int, **options: Any) -> nn.Module:
    """A vision transformer of torchvision behind a resize to 224 pixels; see :data:`RESIZED`."""
    size = (_RESIZED_TO, _RESIZED_TO)
    transformer = build_external(
        "torchvision", name, num_classes=num_classes, image_size=size, channels=channels, **options
    )
    return nn.Sequential(Resize(size), transformer)


def _import(library: str) -> ModuleType:
    module = "torchvision.models" if library == "torchvision" else library
    purpose = f"to build its models by name ({library}:...)"
    try:
        return optional_import(module, extra="models", purpose=purpose)
    except MissingExtraError:
        raise
    except Exception as error:  # a torchvision that does not match torch fails at import with a RuntimeError
        raise MissingExtraError(
            f"bdfast: the package `{library}` is needed {purpose}, but its import failed ({error}); "
            f"install the version that matches torch {torch.__version__}"
        ) from error


def _torchvision(
    module: ModuleType,
    name: str,
    num_classes: int,
    image_size: tuple[int, int],
    channels: int,
    options: dict[str, Any],
) -> nn.Module:
    if name.startswith("vit_"):
        options = {"image_size": _square(name, image_size), **options}
    model: nn.Module = module.get_model(name, weights=None, num_classes=num_classes, **options)
    if channels != 3:
        _replace_stem(model, channels)
    return model


def _timm(
    module: ModuleType,
    name: str,
    num_classes: int,
    image_size: tuple[int, int],
    channels: int,
    options: dict[str, Any],
) -> nn.Module:
    create: Callable[..., nn.Module] = module.create_model
    known = {"pretrained": False, "num_classes": num_classes, "in_chans": channels, **options}
    try:  # transformers are built for one image size, convolutional networks do not know the argument
        return create(name, **{"img_size": image_size, **known})
    except TypeError as error:
        if "img_size" not in str(error) or "img_size" in options:
            raise
    return create(name, **known)


def _square(name: str, image_size: tuple[int, int]) -> int:
    height, width = image_size
    if height != width:
        raise ValueError(message("build", "image_size", f"a square for {name}", f"{image_size}", "crop or pad"))
    return height


def _replace_stem(model: nn.Module, channels: int) -> None:
    """Give the first convolution ``channels`` inputs: torchvision's constructors take RGB only."""
    path, old = next((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    stem = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    model.set_submodule(path, stem)
