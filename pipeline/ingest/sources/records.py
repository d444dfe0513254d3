"""Sources of raw images in files of fixed-size records: IDX (MNIST and everything made like it), CIFAR-10 and -100."""

from __future__ import annotations

import functools
import gzip
import hashlib
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from pipeline import storage
from pipeline.config.dataset import SourceSettings
from pipeline.data.codec import as_binary
from pipeline.ingest.sources import fashion_mnist
from pipeline.ingest.sources.source import Source, SourceError, fingerprint, to_batch

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

# Images that one task makes of its slice of a file, the fewest it reads, and the bytes it holds.
SLICE_ROWS = 10_000
_FEWEST_ROWS = 500
_SLICE_BYTES = 64 << 20
# The four files of MNIST and everything made like it: (split, images, labels).
IDX_FILES = (
    ("train", "train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("test", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_UNSIGNED_BYTE = 0x08
# CIFAR's binary version (Krizhevsky 2009): label bytes, the last of which is the class, then 3 x 32 x 32 pixels.
CIFAR_SHAPE = (3, 32, 32)
CIFAR_LABEL_BYTES = {"cifar10": 1, "cifar100": 2}
CIFAR_FILES = {
    "cifar10": (
        *((f"data_batch_{number}.bin", "train") for number in range(1, 6)),
        ("test_batch.bin", "test"),
    ),
    "cifar100": (("train.bin", "train"), ("test.bin", "test")),
}
CIFAR_NAMES = {"cifar10": "batches.meta.txt", "cifar100": "fine_label_names.txt"}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Records:
    """Consecutive records of one file: ``header`` bytes, then ``rows`` records of ``size`` bytes."""

    path: str
    header: int
    size: int
    rows: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """Images and labels of one split. Labels are a file of their own, or the first bytes of each record."""

    split: str
    images: Records
    labels: Records | None
    label_bytes: int


def open_record_files(spark: SparkSession, settings: SourceSettings, cache: str, *, first_id: int) -> Source:
    """Check the files whole: every one is there, of the length its header states, images and labels match.

    Raises
    ------
    SourceError
        A file is missing, cut or altered, or images and labels differ in number; the file is named.
    """
    if settings.kind in CIFAR_FILES:
        parts, shape, classes = _cifar(settings)
    else:
        parts, shape, classes = _idx(settings, cache)
    rows: dict[str, int] = {}
    for part in parts:
        rows[part.split] = rows.get(part.split, 0) + part.images.rows
    files = [file.sha256 for part in parts for file in (part.images, part.labels) if file]
    content = fingerprint("".join(files))
    slices = list(_slices(parts, first_id, max(_FEWEST_ROWS, SLICE_ROWS // settings.expand)))
    items = spark.createDataFrame(slices, "first_id long, part int, start long, end long").repartition(len(slices))
    read = functools.partial(_read_slices, parts=parts)
    return Source(
        classes=classes,
        rows=rows,
        form="pixels",
        pixel_shape=shape,
        fingerprint=content,
        state=content,
        numbered=True,
        items=items,
        read=read,
    )


def _slices(parts: list[Part], first_id: int, rows: int) -> Iterator[tuple[int, int, int, int]]:
    for number, part in enumerate(parts):
        step = max(1, min(rows, _SLICE_BYTES // part.images.size))
        for start in range(0, part.images.rows, step):
            yield first_id + start, number, start, min(start + step, part.images.rows)
        first_id += part.images.rows


def _idx(settings: SourceSettings, cache: str) -> tuple[list[Part], tuple[int, int, int], tuple[str, ...]]:
    if settings.kind == "fashion_mnist":
        folder = fashion_mnist.locate(settings.path, cache)
        classes: tuple[str, ...] = settings.classes or fashion_mnist.CLASSES
    else:
        assert settings.path is not None, "config checks this"
        folder, classes = storage.absolute(settings.path), settings.classes or ()
    inspected = {name: _inspect_idx(_find(folder, name), name) for _, *pair in IDX_FILES for name in pair}
    if settings.kind == "fashion_mnist":
        fashion_mnist.verify({name: (file.path, file.sha256) for name, (file, _) in inspected.items()})
    shapes = {inspected[images][1] for _, images, _ in IDX_FILES}
    if len(shapes) > 1:
        sizes = ", ".join(f"{inspected[name][0].path} has {inspected[name][1]}" for _, name, _ in IDX_FILES)
        raise SourceError(f"image sizes differ: {sizes}")
    parts = []
    for split, images_name, labels_name in IDX_FILES:
        images, labels = inspected[images_name][0], inspected[labels_name][0]
        if images.rows != labels.rows:
            raise SourceError(
                f"{images.path} has {images.rows} images, but {labels.path} has {labels.rows} labels: give files of "
                "one and the same data set"
            )
        if not images.rows:
            raise SourceError(f"{images.path} has no images: give the files of a data set that has some")
        if not images.size:
            raise SourceError(f"{images.path} has images without a pixel: {inspected[images_name][1]}")
        parts.append(Part(split, images, labels, 0))
    height, width = shapes.pop()
    return parts, (1, height, width), classes


def _cifar(settings: SourceSettings) -> tuple[list[Part], tuple[int, int, int], tuple[str, ...]]:
    folder = storage.absolute(settings.path or "")
    label_bytes = CIFAR_LABEL_BYTES[settings.kind]
    size = label_bytes + math.prod(CIFAR_SHAPE)
    parts = []
    for name, split in CIFAR_FILES[settings.kind]:
        path = _find(folder, name)
        _, length, sha256 = _read_whole(path, 0)
        if not length or length % size:
            raise SourceError(f"{path} is cut or no {settings.kind} file: {length} bytes are not records of {size}")
        parts.append(Part(split, Records(path, 0, size, length // size, sha256), None, label_bytes))
    return parts, CIFAR_SHAPE, _cifar_classes(settings, folder)


def _cifar_classes(settings: SourceSettings, folder: str) -> tuple[str, ...]:
    count = {"cifar10": 10, "cifar100": 100}[settings.kind]
    classes = settings.classes
    names = storage.join(folder, CIFAR_NAMES[settings.kind])
    if classes is None and storage.exists(names):
        classes = tuple(storage.read_bytes(names).decode().split())
    if classes is None and settings.kind == "cifar10":
        classes = CIFAR10_CLASSES
    if classes is None:
        raise SourceError(f"{names}: no such file; set dataset.source.classes to the {count} names in label order")
    if len(classes) != count:
        raise SourceError(
            f"{settings.kind} has {count} classes, but {len(classes)} names were given: name each in "
            "dataset.source.classes, in label order"
        )
    return classes


def _find(folder: str, name: str) -> str:
    """The file, compressed or not."""
    for candidate in (storage.join(folder, name), storage.join(folder, f"{name}.gz")):
        if storage.exists(candidate):
            return candidate
    raise SourceError(f"{storage.join(folder, name)}: no such file, nor {name}.gz")


def _inspect_idx(path: str, name: str) -> tuple[Records, tuple[int, ...]]:
    """Read a whole IDX file once: its records, checked against its length, and the shape of one."""
    dimensions = 3 if "idx3" in name else 1
    header_bytes = 4 + 4 * dimensions
    header, length, sha256 = _read_whole(path, header_bytes)
    if len(header) < header_bytes:
        raise SourceError(f"{path} is cut: {len(header)} bytes are too few for an IDX header")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
    if magic != _UNSIGNED_BYTE << 8 | dimensions:
        raise SourceError(
            f"{path} is not an IDX file of {dimensions} dimensions of bytes: it starts with {magic:#010x}"
        )
    if length != math.prod(shape):
        raise SourceError(
            f"{path} is {'cut' if length < math.prod(shape) else 'too long'}: "
            f"its header says {math.prod(shape)} bytes of data, it has {length}"
        )
    return Records(path, header_bytes, math.prod(shape[1:]), shape[0], sha256), tuple(shape[1:])


def _read_whole(path: str, header_bytes: int) -> tuple[bytes, int, str]:
    """A file's header, the bytes that follow, and the SHA-256 of both (uncompressed)."""
    try:
        with _open_file(path) as file:
            header = file.read(header_bytes)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type] # as in shard_cache
            length = file.seek(0, os.SEEK_END) - len(header)
    except storage.UnreachableError:
        raise
    except (EOFError, OSError, zlib.error) as error:
        raise SourceError(f"{path} is cut or damaged: {error}") from None
    return header, length, sha256


@contextmanager
def _open_file(path: str) -> Iterator[BinaryIO]:
    with storage.open_file(path) as file:
        yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.endswith(".gz") else file


def _read_slices(items: pa.RecordBatch, *, parts: list[Part]) -> Iterator[pa.RecordBatch]:
    """On an executor: slices of files -> their images."""
    import numpy as np
    import pyarrow as pa

    for item in items.to_pylist():
        part, start, end = parts[item["part"]], item["start"], item["end"]
        records = _read_records(part.images, start, end)
        labels = _read_records(part.labels, start, end)[:, 0] if part.labels else records[:, part.label_bytes - 1]
        payload = as_binary(records[:, part.label_bytes :])
        count = end - start
        yield to_batch(
            {
                "id": pa.array(np.arange(item["first_id"], item["first_id"] + count)),
                "split": [part.split] * count,
                "label": pa.array(labels.astype(np.int32)),
                "payload": payload,
                "origin": [f"{part.images.path}#{number}" for number in range(start, end)],
                "problem": pa.nulls(count, pa.string()),
            }
        )


def _read_records(records: Records, start: int, end: int) -> Any:
    """Records [start, end) of a file: uint8 array (rows, size)."""
    import numpy as np

    with _open_file(records.path) as file:
        file.seek(records.header + start * records.size)
        data = file.read((end - start) * records.size)
    if len(data) != (end - start) * records.size:
        raise SourceError(f"{records.path} was cut while it was read: records {start} to {end} are not all there")
    return np.frombuffer(data, np.uint8).reshape(end - start, records.size)
