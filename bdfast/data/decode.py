"""Decodes compressed images (JPEG, PNG, ...) with Pillow into one uint8 tensor."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from bdfast.data.layout import resize
from bdfast.errors import message, optional_import

# Formats with small, well-tested decoders; Pillow's others include ones that start programs (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp")
MAX_PIXELS = 1 << 24  # of one image: 4096 x 4096. A few kilobytes can claim gigapixels
MAX_SET_BYTES = 64 << 30  # of one decoded set
CHUNK = 256  # images a task: one 32x32 JPEG takes 55 us, too little to schedule alone
# Pillow decodes without the interpreter lock but opens with it: on small images two threads only hand the lock to and
# fro (32x32 JPEG: 98 us an image on two threads, 56 us on one).
PIXELS_WORTH_A_THREAD = 128 * 128


def pil_to_chw(
    image: Any,  # PIL.Image.Image
    where: str,
    name: str,
) -> Tensor:
    """A Pillow image as uint8 ``[1, H, W]`` (gray) or ``[3, H, W]`` (everything else; transparency is dropped)."""
    if image.mode not in {"L", "LA", "1", "RGB", "RGBA", "P", "CMYK", "YCbCr"}:
        raise ValueError(
            message(where, name, "an image of 8 bits a channel", f"mode {image.mode}", "convert it to 8 bits first")
        )
    array = np.array(image.convert("L" if image.mode in {"L", "LA", "1"} else "RGB"))
    pixels = torch.from_numpy(array)
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def decode_all(
    count: int,
    open_image: Callable[[int], BinaryIO],
    name: Callable[[int], str],
    image_size: tuple[int, int] | None,
) -> Tensor:
    """Decode images 0..count-1 into uint8 ``[count, C, H, W]``.

    C is 1 if all are gray and 3 otherwise. All images must have one size, unless ``image_size`` (height, width) is
    given. ``open_image(i)`` yields the bytes of image i and ``name(i)`` says which one it is in messages.

    Raises:
        ValueError: a damaged image, one of too many pixels, or of another size than the first.
        MissingExtraError: Pillow is not installed.
    """
    pillow = optional_import("PIL.Image", extra="data", purpose="to decode images")

    def decode(index: int) -> Tensor:
        try:
            with open_image(index) as file:
                image = pillow.open(file, formats=FORMATS)
                if image.width * image.height > MAX_PIXELS:  # known from the header, before a pixel is decoded
                    raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
                image.load()
        except (OSError, ValueError, SyntaxError, EOFError, pillow.DecompressionBombError) as error:
            raise ValueError(
                message("load", name(index), f"a whole image ({', '.join(FORMATS)})", f"{error}", "replace the file")
            ) from error
        pixels = pil_to_chw(image, "load", name(index))
        return resize(pixels.unsqueeze(0), image_size).squeeze(0)

    size = decode(0).shape[1:]
    if 3 * size.numel() * count > MAX_SET_BYTES:
        raise ValueError(
            message(
                "load",
                name(0),
                f"a set of at most {MAX_SET_BYTES >> 30} GiB",
                f"{count} images of {tuple(size)}",
                "pass limit= or a smaller image_size=",
            )
        )

    def decode_chunk(start: int) -> list[Tensor]:
        pixels = [decode(index) for index in range(start, min(start + CHUNK, count))]
        for offset, one in enumerate(pixels):
            if one.shape[1:] != size:
                raise ValueError(
                    message(
                        "load",
                        name(start + offset),
                        f"the size of the first image, {tuple(size)}",
                        str(tuple(one.shape[1:])),
                        "pass image_size= to bring all images to one size",
                    )
                )
        return pixels

    images = torch.empty(count, 1, *size, dtype=torch.uint8)
    worth_threads = image_size is not None or size.numel() >= PIXELS_WORTH_A_THREAD
    workers = min(8, os.cpu_count() or 1) if worth_threads else 1
    with ThreadPoolExecutor(workers) as pool:
        chunks = pool.map(decode_chunk, range(0, count, CHUNK))
        try:
            for index, pixels in enumerate(image for chunk in chunks for image in chunk):
                if len(pixels) > images.shape[1]:
                    images = images.repeat(1, 3, 1, 1)
                images[index] = pixels
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else Ctrl-C would wait for every image of the set
            raise
    return images
