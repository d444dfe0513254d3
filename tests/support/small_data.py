"""Small datasets of three learnable classes, as IDX files, and settings that ingest them into many row groups."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

from pipeline.config.dataset import DatasetSettings, SourceSettings

CLASSES = ("flat", "left", "right")


def write_idx(folder: Path, name: str, array: np.ndarray) -> Path:
    """One gzipped IDX file of bytes, written as its description says."""
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    path = folder / f"{name}.gz"
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0))
    return path


def make_images(rows: int, seed: int, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images of three learnable classes: nothing, a bright left half, a bright right half."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, rows)
    images = random.integers(0, 120, (rows, size, size))
    images[labels == 1, :, : size // 2] += 60
    images[labels == 2, :, size // 2 :] += 60
    return images.astype(np.uint8), labels.astype(np.uint8)


def write_idx_folder(folder: Path, *, train_rows: int, test_rows: int, size: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for rows, prefix, seed in ((train_rows, "train", 1), (test_rows, "t10k", 2)):
        images, labels = make_images(rows, seed, size)
        write_idx(folder, f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder, f"{prefix}-labels-idx1-ubyte", labels)
    return folder


def dataset_settings(path: Path, source: Path, **changes) -> DatasetSettings:
    """Small shards and row groups, so that a small dataset has many of both."""
    defaults = {
        "path": str(path),
        "name": "halves",
        "source": SourceSettings(kind="idx", path=str(source), classes=CLASSES),
        "validation_share": 0.2,
        "shard_bytes": 200 * 12 * 12,
        "row_group_rows": 30,
    }
    return DatasetSettings(**{**defaults, **changes})
