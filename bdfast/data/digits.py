"""The embedded default: scikit-learn's 1,797 handwritten digits, 8x8, gray."""

from __future__ import annotations

import numpy as np
import torch

from bdfast.data.layout import resize
from bdfast.data.splits import DataSplits, ReadOptions, head, split_by_seed
from bdfast.errors import optional_import

TEST_COUNT = 397


def read_digits(options: ReadOptions) -> DataSplits:
    """1,400 training and 397 test images, drawn by ``options.seed``; no file and no network is needed.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    datasets = optional_import("sklearn.datasets", extra="data", purpose='for the "digits" data set')
    digits = datasets.load_digits()
    # 0..16 to 0..255, rounded half up in whole numbers, so that every platform gives the same bytes
    pixels = (np.asarray(digits.images).astype(np.int64) * 255 + 8) // 16
    images = resize(torch.from_numpy(pixels.astype(np.uint8)).unsqueeze(1), options.image_size)
    labels = torch.from_numpy(np.asarray(digits.target).astype(np.int64))
    train, test = split_by_seed(len(labels), TEST_COUNT, options.seed)
    return DataSplits(
        head((images[train], labels[train]), options.limit[0]),
        head((images[test], labels[test]), options.limit[1]),
        tuple(str(digit) for digit in range(10)),
    )
