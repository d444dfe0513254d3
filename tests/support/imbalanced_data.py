"""Small pictures of ten classes, one of which has most of them, as a dataset that is written without Spark."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.config.dataset import DeformSettings
from pipeline.data import manifest
from pipeline.data.manifest import Image, Manifest, Split
from pipeline.ingest import images, tasks
from pipeline.ingest.images import ImageSpec
from pipeline.ingest.layout import Layout

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
    shape = (1, 8, 8)
    layout = Layout(
        dataset=path, prefix="part", splits=tuple((name, 1) for name in ROWS), form="pixels", pixel_shape=shape,
        image=ImageSpec(shape, encoding="raw"), num_classes=CLASSES, row_group_rows=row_group_rows,
        compression="none", expand=1, deform=DeformSettings(), seed=0,
    )  # fmt: skip
    splits = {name: _write_split(name, layout, number) for number, name in enumerate(ROWS)}
    whole = Manifest(
        name="imbalanced", settings_digest="", spark_application="", classes=tuple("abcdefghij"),
        input_rows=sum(ROWS.values()), set_aside={}, sources=(), splits=splits,
        image=Image(encoding="raw", shape=shape),
    )  # fmt: skip
    manifest.publish(path, whole)
    return whole


def _write_split(name: str, layout: Layout, number: int) -> Split:
    pixels, labels = make_pictures(ROWS[name], 1 + number)
    stored = [images.from_pixels(image, layout.image) for image in pixels]
    ids = np.arange(len(labels)) + 10_000 * number
    table = pa.table({"id": ids, "label": labels, "image": stored, "copy": np.zeros(len(labels), np.int32)})
    shard = tasks.write_shard(name, f"{name}/part-00000.parquet", table, layout).shard
    counts = np.bincount(labels, minlength=CLASSES).tolist()
    return manifest.with_statistics(counts, images.channel_sums(pixels).tolist(), (shard,), pixels.shape[1:])
