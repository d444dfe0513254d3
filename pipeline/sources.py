"""Where images come from -> one DataFrame (id, split, label, payload, origin) and what is known about it.

An image's ``id`` is its place in the source, so it is the same every time the source is read.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline import fashion_mnist, storage
from pipeline.config import SourceSettings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

COLUMNS = "id long, split string, label int, payload binary, origin string"
# Rows that one task reads from a pair of IDX files.
SLICE_ROWS = 10_000
# The four files of MNIST and everything made like it: (split, images, labels).
IDX_FILES = (
    ("train", "train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("test", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_UNSIGNED_BYTE = 0x08


class SourceError(ValueError):
    """A source is missing, cut, or contradicts itself."""


@dataclass(frozen=True)
class Source:
    """What is known of a source before a Spark job reads it.

    image_shape : (C, H, W)
    rows : images of each split
    fingerprint : SHA-256 of everything that is in it
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    rows: dict[str, int]
    fingerprint: str
    pairs: tuple[IdxPair, ...]

    def read(self, spark: SparkSession) -> DataFrame:
        """The images as a DataFrame of `COLUMNS`, read by the executors."""
        slices = [
            (
                pair.first_id + start,
                pair.split,
                pair.images,
                pair.labels,
                start,
                min(start + SLICE_ROWS, pair.rows),
            )
            for pair in self.pairs
            for start in range(0, pair.rows, SLICE_ROWS)
        ]
        schema = "first_id long, split string, images string, labels string, start long, end long"
        return spark.createDataFrame(slices, schema).repartition(len(slices)).mapInArrow(_read_slices, COLUMNS)


@dataclass(frozen=True)
class IdxPair:
    """The images and the labels of one split."""

    split: str
    images: str
    labels: str
    rows: int
    first_id: int


@dataclass(frozen=True)
class _IdxFile:
    path: str
    shape: tuple[int, ...]
    sha256: str


def open_source(settings: SourceSettings, cache: str) -> Source:
    """Find the source and check it whole: every file is there, of the length its header states, pairs match.

    Parameters
    ----------
    cache : folder for what has to be fetched

    Raises
    ------
    SourceError
        A file is missing, cut or altered, or images and labels differ in number; the file is named.
    """
    classes: tuple[str, ...]
    if settings.kind == "fashion_mnist":
        folder, classes = fashion_mnist.locate(settings.path, cache), fashion_mnist.CLASSES
    else:
        assert settings.path is not None, "config checks this"
        folder, classes = storage.absolute(settings.path), settings.classes or ()
    files = {name: _inspect(_find(folder, name), name) for _, *pair in IDX_FILES for name in pair}
    if settings.kind == "fashion_mnist":
        fashion_mnist.verify({name: (file.path, file.sha256) for name, file in files.items()})
    return _assemble(files, classes)


def _assemble(files: dict[str, _IdxFile], classes: tuple[str, ...]) -> Source:
    pairs: list[IdxPair] = []
    first_id = 0
    shapes = {files[images].shape[1:] for _, images, _ in IDX_FILES}
    if len(shapes) > 1:
        raise SourceError(f"image sizes differ: {', '.join(f'{f.path} has {f.shape}' for f in files.values())}")
    for split, images_name, labels_name in IDX_FILES:
        images, labels = files[images_name], files[labels_name]
        if images.shape[0] != labels.shape[0]:
            raise SourceError(
                f"{images.path} has {images.shape[0]} images, but {labels.path} has {labels.shape[0]} labels"
            )
        if not images.shape[0]:
            raise SourceError(f"{images.path} has no images")
        pairs.append(IdxPair(split, images.path, labels.path, images.shape[0], first_id))
        first_id += images.shape[0]
    height, width = shapes.pop()
    together = hashlib.sha256("".join(file.sha256 for file in files.values()).encode()).hexdigest()
    return Source(classes, (1, height, width), {p.split: p.rows for p in pairs}, f"sha256:{together}", tuple(pairs))


def _find(folder: str, name: str) -> str:
    """The file, compressed or not."""
    for candidate in (storage.join(folder, name), storage.join(folder, f"{name}.gz")):
        if storage.exists(candidate):
            return candidate
    raise SourceError(f"{storage.join(folder, name)}: no such file, nor {name}.gz")


def _inspect(path: str, name: str) -> _IdxFile:
    """Read a whole IDX file once: its shape, checked against its length, and its SHA-256 (uncompressed)."""
    dimensions = 3 if "idx3" in name else 1
    digest = hashlib.sha256()
    length = 0
    try:
        with _open_idx(path) as file:
            header = file.read(4 + 4 * dimensions)
            digest.update(header)
            while block := file.read(1 << 20):
                digest.update(block)
                length += len(block)
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise SourceError(f"{path} is cut or damaged: {error}") from None
    if len(header) < 4 + 4 * dimensions:
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
    return _IdxFile(path, tuple(shape), digest.hexdigest())


def _open_idx(path: str) -> BinaryIO:
    fs, inner = storage.filesystem(path)
    return fs.open(inner, "rb", compression="gzip" if path.endswith(".gz") else None)


def _read_slices(batches: Iterator[Any]) -> Iterator[Any]:
    """On an executor: slices of IDX files -> record batches of `COLUMNS`."""
    import pyarrow as pa

    for batch in batches:
        for row in batch.to_pylist():
            start, end = row["start"], row["end"]
            images, size = _read_items(row["images"], 3, start, end)
            labels, _ = _read_items(row["labels"], 1, start, end)
            count = end - start
            offsets = pa.py_buffer(memoryview(_offsets(count, size)))
            yield pa.RecordBatch.from_pydict(
                {
                    "id": pa.array(range(row["first_id"], row["first_id"] + count), pa.int64()),
                    "split": pa.array([row["split"]] * count, pa.string()),
                    "label": pa.array(list(labels), pa.int32()),
                    "payload": pa.BinaryArray.from_buffers(pa.binary(), count, [None, offsets, pa.py_buffer(images)]),
                    "origin": pa.array([f"{row['images']}#{n}" for n in range(start, end)], pa.string()),
                }
            )


def _offsets(count: int, size: int) -> Any:
    import numpy as np

    return np.arange(0, (count + 1) * size, size, dtype=np.int32)


def _read_items(path: str, dimensions: int, start: int, end: int) -> tuple[bytes, int]:
    """Items [start, end) of an IDX file, end to end, and the bytes of one item."""
    with _open_idx(path) as file:
        shape = struct.unpack(f">{1 + dimensions}I", file.read(4 + 4 * dimensions))[1:]
        size = math.prod(shape[1:])
        file.seek(4 + 4 * dimensions + start * size)
        data = file.read((end - start) * size)
    if len(data) != (end - start) * size:
        raise SourceError(f"{path} was cut while it was read: items {start} to {end} are not all there")
    return data, size
