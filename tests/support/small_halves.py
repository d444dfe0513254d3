"""The three learnable classes of `small_data` as a dataset that is written without Spark, with any labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from small_data import make_images
from small_splits import write_splits


def write_halves(path: Path | str, *, classes: int = 3, rows: int = 360, channels: int = 1, size: int = 12) -> str:
    """Write splits ``train``, ``validation`` and ``test``, and return the path.

    Parameters
    ----------
    classes : of the dataset, at least 3; those after the third have no image
    """
    splits = {}
    for seed, (name, count) in enumerate((("train", rows), ("validation", rows // 3), ("test", rows // 3))):
        images, labels = make_images(count, seed, size)
        splits[name] = (np.repeat(images[:, None], channels, axis=1), labels)
    write_splits(str(path), splits, classes=classes, row_group_rows=30)
    return str(path)
