"""Datasets of a few small shards, written without Spark: by the ingest job's own writer, or as other programs write."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config.dataset import DeformSettings, ReaderSettings
from pipeline.data import load_manifest, manifest, profile, versions
from pipeline.data.manifest import Manifest, Shard
from pipeline.data.shards import SplitFiles
from pipeline.ingest import images, tasks
from pipeline.ingest.images import ImageSpec
from pipeline.ingest.layout import Layout

SHAPE = (1, 6, 5)


def write_dataset(
    path: str,
    shard_rows: Sequence[int] = (70, 41),
    *,
    shape: tuple[int, int, int] = SHAPE,
    encoding: str = "raw",
    row_group_rows: int = 30,
    compression: str = "none",
    foreign: dict[str, Any] | None = None,
    labels: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One split, ``train``; its images, uint8 (rows, C, H, W), and labels.

    Parameters
    ----------
    foreign : options of ``pyarrow.parquet.write_table``, and ``schema``: write as another program would
    labels : 0 to 2, one for each row; None: at random
    """
    random = np.random.default_rng(len(shard_rows))
    rows = sum(shard_rows)
    pixels = random.integers(0, 256, (rows, *shape), dtype=np.uint8)
    labels = random.integers(0, 3, rows) if labels is None else labels
    layout = Layout(
        dataset=path, prefix="part", splits=(("train", len(shard_rows)),), form="pixels", pixel_shape=shape,
        image=ImageSpec(shape, encoding=encoding), num_classes=3, row_group_rows=row_group_rows,
        compression=compression, expand=1, deform=DeformSettings(), seed=0,
    )  # fmt: skip
    shards = []
    for number, first in enumerate(np.cumsum(shard_rows) - shard_rows):
        part = slice(first, first + shard_rows[number])
        stored = [images.from_pixels(image, layout.image) for image in pixels[part]]
        table = pa.table({"id": range(part.start, part.stop), "label": labels[part], "image": stored})
        name = f"train/part-{number:05d}"
        if foreign is None:
            table = table.append_column("copy", pa.array(np.zeros(len(table), np.int32)))
            shards.append(tasks.write_shard("train", name, table, layout).shard)
        else:
            shards.append(_write_foreign(path, f"{name}.parquet", table, row_group_rows, dict(foreign)))
    counts = np.bincount(labels, minlength=3).tolist()
    split = manifest.with_statistics(counts, profile.channel_sums(pixels).tolist(), tuple(shards), shape)
    versions.publish(
        path,
        Manifest(
            name="small", settings_digest="", spark_application="", classes=("a", "b", "c"), input_rows=rows,
            set_aside={}, sources=(), splits={"train": split}, image=manifest.Image(encoding=encoding, shape=shape),
        ),
    )  # fmt: skip
    return pixels, labels


def _write_foreign(dataset: str, path: str, table: pa.Table, row_group_rows: int, options: dict[str, Any]) -> Shard:
    buffer = io.BytesIO()
    table = table.cast(options.pop("schema", tasks.SHARD_SCHEMA))
    pq.write_table(table, buffer, row_group_size=row_group_rows, **options)
    data = buffer.getvalue()
    storage.publish(storage.join(dataset, path), data)
    groups = [min(row_group_rows, len(table) - first) for first in range(0, len(table), row_group_rows)]
    sha256 = hashlib.sha256(data).hexdigest()
    return Shard(path=path, rows=len(table), bytes=len(data), sha256=sha256, row_groups=tuple(groups))


def change_shard(path: str, number: int, data: bytes, **changes: Any) -> str:
    """Put another file in a shard's place, and let the manifest agree with it but for ``changes``; its name."""
    found = load_manifest(path)
    split = found.split("train")
    shards = list(split.shards)
    fields = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **changes}
    shards[number] = shards[number].model_copy(update=fields)
    storage.publish(storage.join(path, shards[number].path), data)
    changed = split.model_copy(update={"shards": tuple(shards)})
    versions.publish(path, found.model_copy(update={"splits": {"train": changed}}), replaced=found)
    return shards[number].path


def open_files(path: str, **settings: Any) -> SplitFiles:
    return SplitFiles(path, load_manifest(path), "train", ReaderSettings(**settings))


def read_all(files: SplitFiles) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a split in the manifest's order."""
    parts = [files.read(number) for number in range(len(files.group_rows))]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
