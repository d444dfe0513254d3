"""A dataset of given images and labels in several splits, written without Spark by the ingest job's own writer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from pipeline.config.dataset import DeformSettings
from pipeline.data import manifest, profile, versions
from pipeline.data.manifest import Image, Manifest, Preparation
from pipeline.ingest import images, tasks
from pipeline.ingest.images import ImageSpec
from pipeline.ingest.layout import Layout


def write_splits(
    path: str,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    classes: int,
    row_group_rows: int = 60,
    preparation: Preparation | None = None,
) -> Manifest:
    """Write one shard for each split.

    Parameters
    ----------
    splits : images, uint8 (rows, C, H, W), and labels, by the name of the split
    """
    shape = next(iter(splits.values()))[0].shape[1:]
    layout = Layout(
        dataset=path, prefix="part", splits=tuple((name, 1) for name in splits), form="pixels", pixel_shape=shape,
        image=ImageSpec(shape, encoding="raw"), num_classes=classes, row_group_rows=row_group_rows,
        compression="none", expand=1, deform=DeformSettings(), seed=0,
    )  # fmt: skip
    written, first = {}, 0
    for name, (pixels, labels) in splits.items():
        stored = [images.from_pixels(image, layout.image) for image in pixels]
        ids = np.arange(first, first + len(labels))
        table = pa.table({"id": ids, "label": labels, "image": stored, "copy": np.zeros(len(labels), np.int32)})
        shard = tasks.write_shard(name, f"{name}/part-00000", table, layout).shard
        counts = np.bincount(labels, minlength=classes).tolist()
        written[name] = manifest.with_statistics(counts, profile.channel_sums(pixels).tolist(), (shard,), shape)
        first += len(labels)
    whole = Manifest(
        name="small", settings_digest="", spark_application="", classes=tuple(f"class {n}" for n in range(classes)),
        input_rows=first, set_aside={}, sources=(), splits=written, image=Image(encoding="raw", shape=shape),
        preparation=preparation,
    )  # fmt: skip
    versions.publish(path, whole)
    return whole


def write_easy_splits(path: str, *, shape: tuple[int, int, int] = (1, 8, 8), rows: int = 64) -> str:
    """A dataset of three classes that brightness tells: ``rows`` training images, 50 test and 50 validation images."""
    generator = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = generator.integers(0, 3, count)
        noise = generator.integers(0, 120, (count, *shape))
        return (noise + 60 * labels[:, None, None, None]).astype(np.uint8), labels

    splits = {"train": part(rows), "test": part(50), "validation": part(50)}
    write_splits(path, splits, classes=3, row_group_rows=8)
    return path
