"""What executors do in the ingest job: check images, make deformed copies, write shards. Plain functions over Arrow.

A task publishes each shard whole under its final name and reports it; a shard's bytes depend on its rows alone.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config.dataset import DeformSettings
from pipeline.data import reasons
from pipeline.data.codec import BadImageError, as_binary, as_rows, decode_stored
from pipeline.ingest import images
from pipeline.ingest.deform import deform
from pipeline.ingest.images import ImageSpec

QUARANTINE = "quarantine"
# Bytes of images that one record batch holds, about; and rows that are deformed at once, few enough for the caches.
BATCH_BYTES = 16 << 20
_DEFORMED_ROWS = 128
# One page for each row group, so that a row group's images lie in one piece of the file.
_WHOLE_ROW_GROUP = 1 << 30
SHARD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
    ]
)
_QUARANTINE_SCHEMA = pa.schema([("id", pa.int64()), ("origin", pa.string()), ("reason", pa.string())])
_CHECKED = ("id", "split", "label", "image", "origin", "reason")


@dataclass(frozen=True)
class Layout:
    """What a task must know; plain values, since it is pickled.

    splits : (name, shards) of each split; shards are numbered through all splits in this order, quarantine last
    form, pixel_shape : what payloads are (see `sources.Source`)
    expand : images that each training image becomes, itself and deformed copies
    """

    dataset: str
    prefix: str
    splits: tuple[tuple[str, int], ...]
    form: str
    pixel_shape: tuple[int, int, int] | None
    image: ImageSpec
    num_classes: int
    row_group_rows: int
    compression: str
    expand: int
    deform: DeformSettings
    seed: int

    def split_of(self, shard: int) -> tuple[str, int]:
        """The split that a shard belongs to, and its number inside it."""
        for name, count in self.splits:
            if shard < count:
                return name, shard
            shard -= count
        raise AssertionError(f"shard {shard} is past the last split")

    @property
    def batch_rows(self) -> int:
        return max(1, min(10_000, BATCH_BYTES // self.image.raw_bytes))


def check(
    batches: Iterator[pa.RecordBatch], read: Callable[[pa.RecordBatch], Iterator[pa.RecordBatch]], layout: Layout
) -> Iterator[pa.RecordBatch]:
    """Items of a source -> images of one shape, or a reason to set the row aside and no image."""
    # A source that is expanded stays raw until its copies are made.
    spec = replace(layout.image, encoding="raw") if layout.expand > 1 else layout.image
    for items in batches:
        for rows in read(items):
            for start in range(0, rows.num_rows, layout.batch_rows):
                yield _checked(rows.slice(start, layout.batch_rows), layout, spec)


def _checked(rows: pa.RecordBatch, layout: Layout, spec: ImageSpec) -> pa.RecordBatch:
    labels = rows.column("label")
    bad_label = pc.case_when(
        pc.make_struct(
            labels.is_null(), pc.or_(pc.less(labels, 0), pc.greater_equal(labels, layout.num_classes)).fill_null(False)
        ),
        reasons.MISSING_LABEL,
        reasons.UNKNOWN_LABEL,
    )
    if layout.form == "pixels" and spec.encoding == "raw" and layout.pixel_shape == spec.shape:
        stored, bad_image = _as_they_are(rows.column("payload"), spec)
    else:
        stored, bad_image = _made(rows, layout, spec)
    reason = pc.coalesce(rows.column("problem"), bad_image, bad_label)
    usable = pc.if_else(reason.is_null(), stored, pa.scalar(None, pa.binary()))
    return pa.RecordBatch.from_arrays(
        [rows.column("id"), rows.column("split"), labels, usable, rows.column("origin"), reason], names=list(_CHECKED)
    )


def _as_they_are(payloads: pa.Array, spec: ImageSpec) -> tuple[pa.Array, pa.Array]:
    """Pixels that have the shape already: no row is looked at by itself."""
    right_size = pc.equal(pc.binary_length(payloads), spec.raw_bytes).fill_null(False)
    return payloads, pc.case_when(
        pc.make_struct(payloads.is_null(), pc.invert(right_size)), reasons.MISSING_IMAGE, reasons.WRONG_SIZE
    )


def _made(rows: pa.RecordBatch, layout: Layout, spec: ImageSpec) -> tuple[pa.Array, pa.Array]:
    images_made: list[bytes | None] = []
    problems: list[str | None] = []
    for payload, problem in zip(rows.column("payload"), rows.column("problem").to_pylist(), strict=True):
        image, reason = None, problem
        if problem is None:
            try:
                image = make_image(payload.as_py(), layout, spec)
            except BadImageError as error:
                reason = str(error)
        images_made.append(image)
        problems.append(reason)
    return pa.array(images_made, pa.binary()), pa.array(problems, pa.string())


def make_image(payload: Any, layout: Layout, spec: ImageSpec) -> bytes:
    """One payload -> a stored image.

    Raises
    ------
    BadImageError
        It cannot be used; the message is the reason.
    """
    if layout.form == "file":
        return images.from_file(payload, spec)
    if layout.form == "spark_image":
        return images.from_spark_image(payload, spec)
    assert layout.pixel_shape is not None
    if payload is None:
        raise BadImageError(reasons.MISSING_IMAGE)
    return images.from_pixels(decode_stored(payload, "raw", layout.pixel_shape), spec)


def expand(batches: Iterator[pa.RecordBatch], layout: Layout) -> Iterator[pa.RecordBatch]:
    """Every row, as copy 0, and deformed copies 1, 2, ... of the training images."""
    for batch in batches:
        for start in range(0, batch.num_rows, layout.batch_rows):
            rows = batch.slice(start, layout.batch_rows)
            yield _copies(rows, _encoded(rows.column("image"), layout.image), 0)
            train = rows.filter(pc.and_(pc.equal(rows.column("split"), "train"), rows.column("reason").is_null()))
            if not train.num_rows:
                continue
            pixels = as_rows(train.column("image"), layout.image.raw_bytes)
            assert pixels is not None, "rows of another size were set aside"
            for copy in range(1, layout.expand):
                yield _copies(train, _deformed(pixels, train.column("id").to_numpy(), copy, layout), copy)


def _copies(rows: pa.RecordBatch, stored: pa.Array, copy: int) -> pa.RecordBatch:
    columns = {name: rows.column(name) for name in rows.schema.names}
    columns["image"], columns["copy"] = stored, pa.array(np.full(rows.num_rows, copy, np.int32))
    return pa.RecordBatch.from_pydict(columns)


def _encoded(raw: pa.Array, spec: ImageSpec) -> pa.Array:
    return raw if spec.encoding == "raw" else pa.array([encode(value, spec) for value in raw.to_pylist()], pa.binary())


def encode(raw: bytes | None, spec: ImageSpec) -> bytes | None:
    """Raw pixels of the spec's shape as they are stored."""
    return None if raw is None else images.from_pixels(np.frombuffer(raw, np.uint8).reshape(spec.shape), spec)


def _deformed(pixels: np.ndarray, ids: np.ndarray, copy: int, layout: Layout) -> pa.Array:
    """One deformed copy of each row, in blocks that fit the processor's caches."""
    made = np.empty_like(pixels)
    for start in range(0, len(pixels), _DEFORMED_ROWS):
        block = slice(start, start + _DEFORMED_ROWS)
        copies = np.full(len(ids[block]), copy)
        shaped = pixels[block].reshape(-1, *layout.image.shape)
        made[block] = deform(shaped, ids[block], copies, seed=layout.seed, settings=layout.deform).reshape(
            len(copies), -1
        )
    return _encoded(as_binary(made), layout.image)


def write(batches: Iterator[pa.RecordBatch], layout: Layout) -> Iterator[pa.RecordBatch]:
    """Rows sorted by shard -> published files, one record (JSON) of each."""
    for shard, rows in _by_shard(batches):
        split, number = layout.split_of(shard)
        path = f"{split}/{layout.prefix}-{number:05d}.parquet"
        where = storage.join(layout.dataset, path)
        record = _write_quarantine(where, rows) if split == QUARANTINE else _write_shard(where, rows, layout)
        text = json.dumps({"split": split, "path": path, **record})
        yield pa.RecordBatch.from_pydict({"record": pa.array([text], pa.string())})


def _by_shard(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, pa.Table]]:
    """Consecutive rows of one shard, as one table each."""
    current = -1
    parts: list[pa.RecordBatch] = []
    for batch in batches:
        shards = batch.column("shard").to_numpy()
        cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1), len(shards)]
        for start, end in itertools.pairwise(cuts):
            if start == end:
                continue
            if shards[start] != current and parts:
                yield current, pa.Table.from_batches(parts)
                parts = []
            current = int(shards[start])
            parts.append(batch.slice(start, end - start))
    if parts:
        yield current, pa.Table.from_batches(parts)


def _write_shard(path: str, rows: pa.Table, layout: Layout) -> dict[str, Any]:
    """Write and publish one shard; its record, with exact integer sums for the statistics of the split."""
    buffer = io.BytesIO()
    sums = np.zeros((2, layout.image.shape[0]), dtype=np.int64)
    groups = []
    compression = {"id": "none", "label": "none", "image": layout.compression}
    # No statistics and no dictionary on `image`: they would copy whole images into the footer.
    with pq.ParquetWriter(
        buffer, SHARD_SCHEMA, compression=compression, use_dictionary=["label"], write_statistics=["id", "label"],
        data_page_size=_WHOLE_ROW_GROUP, write_page_checksum=True,
    ) as writer:  # fmt: skip
        for start in range(0, rows.num_rows, layout.row_group_rows):
            group = rows.slice(start, layout.row_group_rows).select(SHARD_SCHEMA.names).cast(SHARD_SCHEMA)
            writer.write_table(group, row_group_size=layout.row_group_rows)
            groups.append(group.num_rows)
            for chunk in group.column("image").chunks:
                sums += images.channel_sums(_pixels(chunk, layout.image))
    data = buffer.getvalue()
    storage.publish(path, data)
    counts = np.bincount(rows.column("label").to_numpy(), minlength=layout.num_classes)
    return {
        "rows": rows.num_rows,
        "originals": pc.sum(pc.equal(rows.column("copy"), 0)).as_py(),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "row_groups": groups,
        "label_counts": counts.tolist(),
        "sums": sums.tolist(),
    }


def _pixels(stored: pa.Array, spec: ImageSpec) -> np.ndarray:
    """Stored images as they will be read: uint8 (rows, C, H, W)."""
    if spec.encoding == "raw":
        rows = as_rows(stored, spec.raw_bytes)
        assert rows is not None, "rows of another size were set aside"
        return rows.reshape(-1, *spec.shape)
    return np.stack([decode_stored(value.as_py(), spec.encoding, spec.shape) for value in stored])


def _write_quarantine(path: str, rows: pa.Table) -> dict[str, Any]:
    buffer = io.BytesIO()
    pq.write_table(rows.select(_QUARANTINE_SCHEMA.names).cast(_QUARANTINE_SCHEMA), buffer)
    storage.publish(path, buffer.getvalue())
    return {"rows": rows.num_rows, "reasons": Counter(rows.column("reason").to_pylist())}
