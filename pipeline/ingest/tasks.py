"""What executors do in the ingest job: check images, make deformed copies, write shards. Functions over Arrow batches.

A task publishes each shard whole under its final name and reports it; a shard's bytes depend on its rows, and on
pyarrow's version, alone.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from pipeline import storage
from pipeline.config.frozen import FrozenModel
from pipeline.config.secrets import masked
from pipeline.data import profile, reasons
from pipeline.data.codec import BadImageError, as_binary, as_rows, decode_stored
from pipeline.data.manifest import QUARANTINE, Shard
from pipeline.ingest import images
from pipeline.ingest.deform import deform
from pipeline.ingest.duplicates import leave_out
from pipeline.ingest.images import ImageSpec
from pipeline.ingest.layout import Layout
from pipeline.storage.writable import naming_setting

# Rows that are deformed at once, few enough for the processor's caches.
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


class WrittenShard(FrozenModel):
    """What a task reports of a shard that it published.

    writer : the host that wrote it, and its version of pyarrow
    originals : rows that are no deformed copies
    label_counts : rows of each class
    pixel_sums : per channel the sum of pixel values (0 to 255), and of their squares; exact
    """

    split: str
    shard: Shard
    writer: tuple[str, str]
    originals: int
    label_counts: tuple[int, ...]
    pixel_sums: tuple[tuple[int, ...], tuple[int, ...]]


class WrittenQuarantine(FrozenModel):
    """What a task reports of a file of rows that were set aside: its path in the dataset, and rows by reason."""

    path: str
    reasons: dict[str, int]


_RECORD: TypeAdapter[WrittenShard | WrittenQuarantine] = TypeAdapter(WrittenShard | WrittenQuarantine)


def read_record(text: str) -> WrittenShard | WrittenQuarantine:
    """What a task has reported of one file, from its JSON."""
    return _RECORD.validate_json(text)


def check(
    batches: Iterator[pa.RecordBatch], read: Callable[[pa.RecordBatch], Iterator[pa.RecordBatch]], layout: Layout
) -> Iterator[pa.RecordBatch]:
    """Items of a source -> rows whose images have one shape, or a reason to set the row aside and no image."""
    # A source that is expanded stays raw until its copies are made.
    spec = replace(layout.image, encoding="raw", keep_jpeg=False) if layout.expand > 1 else layout.image
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
        stored, bad_image = _made_one_by_one(rows, layout, spec)
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


def _made_one_by_one(rows: pa.RecordBatch, layout: Layout, spec: ImageSpec) -> tuple[pa.Array, pa.Array]:
    """Stored images, and for those that cannot be made the reason."""
    stored: list[bytes | None] = []
    problems: list[str | None] = []
    for payload, problem in zip(rows.column("payload"), rows.column("problem").to_pylist(), strict=True):
        image, reason = None, problem
        if problem is None:
            try:
                image = make_image(payload.as_py(), layout, spec)
            except BadImageError as error:
                reason = str(error)
        stored.append(image)
        problems.append(reason)
    return pa.array(stored, pa.binary()), pa.array(problems, pa.string())


def make_image(payload: Any, layout: Layout, spec: ImageSpec) -> bytes:
    """Make a stored image of one payload.

    Parameters
    ----------
    payload : bytes, or for ``layout.form`` spark_image the struct as a dictionary; None where it is missing

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
    """Yield every row as copy 0, and deformed copies 1, 2, ... of the training images."""
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
    return (
        raw
        if spec.encoding == "raw"
        else pa.array([images.from_raw(value, spec) for value in raw.to_pylist()], pa.binary())
    )


def _deformed(pixels: np.ndarray, ids: np.ndarray, copy: int, layout: Layout) -> pa.Array:
    """One deformed copy of each row, in blocks that fit the processor's caches."""
    deformed = np.empty_like(pixels)
    for start in range(0, len(pixels), _DEFORMED_ROWS):
        block = slice(start, start + _DEFORMED_ROWS)
        copies = np.full(len(ids[block]), copy)
        shaped = pixels[block].reshape(-1, *layout.image.shape)
        block_of_copies = deform(shaped, ids[block], copies, seed=layout.seed, settings=layout.deform)
        deformed[block] = block_of_copies.reshape(len(copies), -1)
    return _encoded(as_binary(deformed), layout.image)


def write(batches: Iterator[pa.RecordBatch], layout: Layout) -> Iterator[pa.RecordBatch]:
    """Publish a file for each shard of rows that are sorted by shard and key, and yield a record (JSON) of each."""
    for shard, with_marks in by_shard(batches):
        rows = leave_out(with_marks)
        if not rows.num_rows:
            continue
        split, path = layout.file_of(shard)
        written: WrittenShard | WrittenQuarantine
        if split == QUARANTINE:
            written = write_quarantine(layout.dataset, path, rows)
        else:
            written = write_shard(split, path, rows, layout)
        yield pa.RecordBatch.from_pydict({"record": pa.array([written.model_dump_json()], pa.string())})


def by_shard(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, pa.Table]]:
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


def write_shard(split: str, path: str, rows: pa.Table, layout: Layout) -> WrittenShard:
    """Write and publish one shard.

    Parameters
    ----------
    path : in the dataset, without the end that its content gives it
    rows : columns of `SHARD_SCHEMA` and ``copy``, in the order of the shard
    """
    buffer = io.BytesIO()
    pixel_sums = np.zeros((2, layout.image.shape[0]), dtype=np.int64)
    row_groups = []
    compression = {"id": "none", "label": "none", "image": layout.compression}
    # No statistics and no dictionary on `image`: they would copy whole images into the footer.
    with pq.ParquetWriter(
        buffer, SHARD_SCHEMA, compression=compression, use_dictionary=["label"], write_statistics=["id", "label"],
        data_page_size=_WHOLE_ROW_GROUP, write_page_checksum=True,
    ) as writer:  # fmt: skip
        for start in range(0, rows.num_rows, layout.row_group_rows):
            group = rows.slice(start, layout.row_group_rows).select(SHARD_SCHEMA.names).cast(SHARD_SCHEMA)
            writer.write_table(group, row_group_size=layout.row_group_rows)
            row_groups.append(group.num_rows)
            for chunk in group.column("image").chunks:
                pixel_sums += profile.channel_sums(_pixels(chunk, layout.image))
    data = buffer.getvalue()
    path, sha256 = _publish(layout.dataset, path, data)
    sums, squares = pixel_sums.tolist()
    return WrittenShard(
        split=split,
        shard=Shard(path=path, rows=rows.num_rows, bytes=len(data), sha256=sha256, row_groups=tuple(row_groups)),
        writer=(socket.gethostname(), pa.__version__),
        originals=pc.sum(pc.equal(rows.column("copy"), 0)).as_py(),
        label_counts=tuple(np.bincount(rows.column("label").to_numpy(), minlength=layout.num_classes).tolist()),
        pixel_sums=(tuple(sums), tuple(squares)),
    )


def _publish(dataset: str, path: str, data: bytes) -> tuple[str, str]:
    """Publish a file whose name ends with the hash of its content: of two attempts at a task, none puts other bytes in
    the place of what the other has written.

    Returns
    -------
    (path, sha256) : the file's path in the dataset, and the hash in hexadecimal digits
    """
    sha256 = hashlib.sha256(data).hexdigest()
    path = f"{path}-{sha256[:12]}.parquet"
    with naming_setting("dataset.path", dataset):
        if storage.size(storage.join(dataset, path)) != len(data):
            storage.publish(storage.join(dataset, path), data)
    return path, sha256


def _pixels(stored: pa.Array, spec: ImageSpec) -> np.ndarray:
    """Stored images as they will be read: uint8 (rows, C, H, W)."""
    if spec.encoding == "raw":
        rows = as_rows(stored, spec.raw_bytes)
        assert rows is not None, "rows of another size were set aside"
        return rows.reshape(-1, *spec.shape)
    return np.stack([decode_stored(value.as_py(), spec.encoding, spec.shape) for value in stored])


def write_quarantine(dataset: str, path: str, rows: pa.Table) -> WrittenQuarantine:
    """Write and publish the file of rows that are set aside: columns id, origin and reason."""
    buffer = io.BytesIO()
    table = rows.select(_QUARANTINE_SCHEMA.names).cast(_QUARANTINE_SCHEMA)
    origins = pa.array(masked(table.column("origin").to_pylist()), pa.string())  # paths, perhaps with a password
    pq.write_table(table.set_column(1, "origin", origins), buffer)
    path, _ = _publish(dataset, path, buffer.getvalue())
    return WrittenQuarantine(path=path, reasons=Counter(rows.column("reason").to_pylist()))
