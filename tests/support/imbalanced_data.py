"""Small pictures of ten classes, one of which has most of them, as a dataset that is written without Spark."""

from __future__ import annotations

import numpy as np
from small_splits import write_splits

from pipeline.data.manifest import Manifest

CLASSES = 10
# Shares of a folder of a user's: the largest class has 61%.
SHARES = (0.61, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.02, 0.02)
ROWS = {"train": 3040, "validation": 400, "test": 380}


def make_pictures(rows: int, seed: int, *, size: int = 8, contrast: float = 45.0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (rows, 1, size, size) and labels: a pattern of the class at random strength, under noise."""
    patterns = np.random.default_rng(0).normal(0, 1, (CLASSES, size, size))
    random = np.random.default_rng(seed)
    labels = random.choice(CLASSES, rows, p=SHARES)
    strength = random.uniform(0.4, 1.2, (rows, 1, 1)) * contrast
    pixels = 128 + strength * patterns[labels] + random.normal(0, 45, (rows, size, size))
    return np.clip(pixels, 0, 255).astype(np.uint8)[:, None], labels


def write_imbalanced(path: str, *, row_group_rows: int = 60) -> Manifest:
    """The dataset with its three splits; returns its manifest."""
    splits = {name: make_pictures(rows, 1 + number) for number, (name, rows) in enumerate(ROWS.items())}
    return write_splits(path, splits, classes=CLASSES, row_group_rows=row_group_rows)
