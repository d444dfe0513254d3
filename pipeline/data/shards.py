"""The shards of one split: opened, verified once, and read by row group, from a local disk or anything fsspec opens.

A row group's raw images lie in one piece of an uncompressed file, each behind its length (Parquet's PLAIN encoding of
byte arrays), so they are read straight into the memory that batches are gathered from. A file that another program
wrote otherwise, or a compressed one, is decoded by pyarrow: slower, and the same images.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config.dataset import ReaderSettings
from pipeline.data import shard_cache
from pipeline.data.codec import BadImageError, as_rows, decode_stored
from pipeline.data.manifest import DatasetError, Manifest, Shard

MAX_OPEN_FILES = 64
# Before each value PLAIN has its length, 4 bytes, little-endian (Parquet format, "Encodings").
PREFIX = 4
# In memory: a label; a payload's Python object and the pointers to it.
_LABEL_BYTES, _BYTES_OBJECT = 8, 64
# A page header is a few dozen bytes; where more is left over, the row group is no single page.
_LARGEST_PAGE_HEADER = 256
_IS_RIGHT_TYPE: dict[str, Callable[[pa.DataType], bool]] = {
    "id": pa.types.is_integer,
    "label": pa.types.is_integer,
    "image": lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind),
}
# What pyarrow raises on files that are no Parquet, or damaged.
_DAMAGE = (OSError, pa.ArrowException, ValueError, RuntimeError, ArithmeticError, LookupError)


class SplitFiles:
    """The row groups of one split, numbered as in `Split.row_groups`. Any number of threads may read.

    Parameters
    ----------
    dataset : folder or fsspec URL of the dataset
    settings : whether files are verified, and where copies of remote ones are kept

    Raises
    ------
    DatasetError
        From every method that reads: the shard is missing, cut, altered, or holds other rows than the manifest says;
        shard and row group are named.
    """

    def __init__(self, dataset: str, manifest: Manifest, split: str, settings: ReaderSettings | None = None):
        self.dataset, self.settings = dataset, settings or ReaderSettings()
        self.shape, self.encoding = manifest.image.shape, manifest.image.encoding
        self.image_bytes = int(np.prod(self.shape))
        self.num_classes = len(manifest.classes)
        self._shards = manifest.split(split).shards
        self.row_groups = manifest.split(split).row_groups
        self.group_rows = np.array(manifest.split(split).group_rows, dtype=np.int64)
        self._open: OrderedDict[str, _Shard] = OrderedDict()
        self._verified: set[str] = set()
        self._lock = threading.Lock()

    @property
    def memory_bytes(self) -> int:
        """Memory that the whole split takes, as it is stored."""
        if self.encoding == "raw":
            return int(self.group_rows.sum()) * (PREFIX + self.image_bytes + _LABEL_BYTES)
        return sum(shard.bytes for shard in self._shards) + int(self.group_rows.sum()) * _BYTES_OBJECT

    def name(self, number: int) -> str:
        """A row group as errors name it."""
        return self.row_groups[number].named_in(self.dataset)

    def read(self, number: int, first: int = 0, end: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows [first, end) of a row group: uint8 images (rows, C, H, W), contiguous, and int64 labels (rows,)."""
        end = int(self.group_rows[number]) if end is None else end
        if self.encoding == "raw":
            images = np.ascontiguousarray(self.read_raw(number, first, end)).reshape(-1, *self.shape)
        else:
            stored = self.read_stored(number, first, end)
            images = np.stack([self.decode(payload, number) for payload in stored])
        return images, self.read_labels(number, first, end)

    def read_labels(self, number: int, first: int, end: int) -> np.ndarray:
        """Labels of rows [first, end) of a row group: int64 (rows,), all of them numbers of classes."""
        labels, group = self._shard(number).labels, self.row_groups[number].number
        if group not in labels:
            found = self._integers(number, "label")
            # On a GPU a label without a class is an assert that names nothing, and that ends the use of the process.
            if (wrong := label_without_class(found, self.num_classes)) is not None:
                raise DatasetError(f"{self.name(number)}: {wrong}")
            labels[group] = found
        return labels[group][first:end]

    def read_ids(self, number: int, first: int, end: int) -> np.ndarray:
        """Ids of rows [first, end) of a row group: int64 (rows,). They are read from the file at every call."""
        return self._integers(number, "id")[first:end]

    def read_raw(self, number: int, first: int, end: int, target: np.ndarray | None = None) -> np.ndarray:
        """Rows [first, end) of a row group of raw images: a view of ``target``, uint8 (rows, image_bytes).

        Parameters
        ----------
        target : uint8 (rows, PREFIX + image_bytes), contiguous; an image's length comes before it
        """
        if target is None:
            target = np.empty((end - first, PREFIX + self.image_bytes), np.uint8)
        shard, group = self.row_groups[number]
        with self._naming(number):
            starts = self._shard(number).raw_starts
            if group not in starts:
                starts[group] = self._shard(number).raw_start(group, shard.row_groups[group], self.image_bytes)
            start = starts[group]
        if start is not None and self._read_piece(number, start, first, target):
            return target[:, PREFIX:]
        column = self._column(number, "image").slice(first, end - first)
        done = 0
        for chunk in column.chunks:
            rows = as_rows(chunk, self.image_bytes)
            if rows is None:
                raise DatasetError(
                    f"{self.name(number)}: an image is not {self.image_bytes} bytes (shape {self.shape})"
                )
            target[done : done + len(rows), PREFIX:] = rows
            done += len(rows)
        return target[:, PREFIX:]

    def read_stored(self, number: int, first: int, end: int) -> list[bytes]:
        """Rows [first, end) of a row group of encoded images, as they are stored."""
        return self._column(number, "image").slice(first, end - first).to_pylist()

    def decode(self, payload: bytes, number: int) -> np.ndarray:
        """One stored image of a row group: uint8 (C, H, W)."""
        try:
            return decode_stored(payload, self.encoding, self.shape)
        except BadImageError as error:
            raise self.damaged(number, str(error)) from None

    def damaged(self, number: int, reason: str) -> DatasetError:
        """The error of a row group with an image that cannot be decoded."""
        return DatasetError(f"{self.name(number)}: an image is damaged: {reason}")

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _read_piece(self, number: int, start: int, first: int, target: np.ndarray) -> bool:
        """Read rows from ``first`` on as they lie in the file; False where they do not lie as a single page would."""
        with self._naming(number):
            self._shard(number).read_into(start + first * target.shape[1], target)
        length = np.frombuffer(self.image_bytes.to_bytes(PREFIX, "little"), np.uint8)
        return bool((target[:, :PREFIX] == length).all())

    def _integers(self, number: int, column: str) -> np.ndarray:
        # Not `to_numpy`, which imports pandas: half a second before the first step of a new worker.
        return np.concatenate([np.from_dlpack(chunk) for chunk in self._column(number, column).chunks], dtype=np.int64)

    def _column(self, number: int, column: str) -> pa.ChunkedArray:
        row_group = self.row_groups[number]
        with self._naming(number):
            values = self._shard(number).read_column(row_group.number, column).column(column)
        if len(values) != row_group.rows:
            raise DatasetError(f"{self.name(number)}: has {len(values)} rows, the manifest says {row_group.rows}")
        if not _IS_RIGHT_TYPE[column](values.type) or values.null_count:
            raise DatasetError(f"{self.name(number)}: `{column}` is {values.type} with {values.null_count} nulls")
        return values

    @contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        """What a damaged file raises, as an error that names the row group."""
        try:
            yield
        except DatasetError:
            raise
        except _DAMAGE as error:
            raise DatasetError(f"{self.name(number)}: cannot be read: {error}") from error

    def _shard(self, number: int) -> _Shard:
        """The open shard of a row group. Of many files the longest unused one is closed once nobody reads it."""
        listed = self.row_groups[number].shard
        with self._lock:
            shard = self._open.get(listed.path)
            if shard is None:
                path = storage.join(self.dataset, listed.path)
                shard = self._open[listed.path] = _Shard(path, listed, self.settings)
                while len(self._open) > MAX_OPEN_FILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(listed.path)
        try:
            shard.ready(verify=self.settings.verify == "shard" and listed.path not in self._verified)
        except DatasetError as error:
            raise DatasetError(f"{self.name(number)}: {error}") from error
        except _DAMAGE as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            raise DatasetError(f"{self.name(number)}: {reason}") from error
        self._verified.add(listed.path)
        return shard


def label_without_class(labels: np.ndarray, num_classes: int) -> str | None:
    """What is wrong with the labels of a row group, int64 (rows,); None where all are from 0 to ``num_classes`` - 1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if not len(wrong):
        return None
    more = f" (and {len(wrong) - 1} other rows)" if len(wrong) > 1 else ""
    return (
        f"row {wrong[0]} has label {labels[wrong[0]]}{more}, but the dataset has {num_classes} classes, "
        f"0 to {num_classes - 1}: ingest it again"
    )


def check_file(file: BinaryIO, shard: Shard, *, verify: bool) -> None:
    """Compare an open file with what the manifest says of its shard: its size, and if asked its SHA-256.

    Raises
    ------
    DatasetError
        It is another one; the message does not name it.
    """
    size = file.seek(0, os.SEEK_END)
    if size != shard.bytes:
        state = "cut" if size < shard.bytes else "too long"
        raise DatasetError(f"is {state}: {size} bytes, the manifest says {shard.bytes}")
    if verify:
        sha256 = shard_cache.sha256_of(file)
        if sha256 != shard.sha256:
            raise DatasetError(f"was altered: its SHA-256 is {sha256}, the manifest says {shard.sha256}")


class _Shard:
    """One open file. Its errors do not name it: `SplitFiles` does."""

    def __init__(self, path: str, shard: Shard, settings: ReaderSettings):
        self._path, self._shard, self._settings = path, shard, settings
        # By row group, kept while the file is open: what is small and asked for in every epoch.
        self.labels: dict[int, np.ndarray] = {}
        self.raw_starts: dict[int, int | None] = {}
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._parquet: pq.ParquetFile | None = None
        self._remote = settings.cache is None and not storage.is_local(path)  # has no descriptor to read from

    def ready(self, *, verify: bool) -> None:
        """Open the file, once; of several threads one does it and the others wait."""
        with self._lock:
            if self._parquet is not None:
                return
            if storage.is_local(self._path) or self._settings.cache is None:
                # Closed when the last thread lets go of this object, so that none reads from another's descriptor.
                self._open(storage.open_file(self._path), verify=verify)
            else:
                self._open_copy(self._settings.cache, verify=verify)

    def _open_copy(self, folder: str, *, verify: bool) -> None:
        try:
            self._open(self._copy(folder), verify=verify)
        except DatasetError:
            copy = shard_cache.copy_path(self._shard, folder)
            if not copy.exists():
                raise
            copy.unlink(missing_ok=True)  # it was damaged on this disk: fetched again
            self._open(self._copy(folder), verify=verify)

    def _copy(self, folder: str) -> BinaryIO:
        return shard_cache.open_copy(self._path, self._shard, folder, self._settings.cache_bytes)

    def _open(self, file: BinaryIO, *, verify: bool) -> None:
        check_file(file, self._shard, verify=verify)
        self._parquet = pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
        self._file = file

    def raw_start(self, group: int, rows: int, image_bytes: int) -> int | None:
        """Where the row group's first value starts in the file, if its images seem to lie in one uncompressed page."""
        assert self._parquet is not None
        metadata = self._parquet.metadata
        if group >= metadata.num_row_groups:
            return None
        columns = map(metadata.row_group(group).column, range(metadata.num_columns))
        column = next((column for column in columns if column.path_in_schema == "image"), None)
        if column is None or column.compression != "UNCOMPRESSED" or column.has_dictionary_page:
            return None
        header = column.total_compressed_size - rows * (PREFIX + image_bytes)
        if column.num_values != rows or not 0 < header <= _LARGEST_PAGE_HEADER:
            return None
        return column.data_page_offset + header

    def read_into(self, start: int, target: np.ndarray) -> None:
        """Fill ``target`` with the bytes of the file from ``start`` on."""
        assert self._file is not None
        if self._remote:
            data = storage.read_range(self._path, start, start + target.nbytes)
            if len(data) != target.nbytes:
                raise OSError(f"{len(data)} bytes came instead of {target.nbytes}")
            target.reshape(-1)[:] = np.frombuffer(data, np.uint8)
            return
        left = memoryview(target.reshape(-1))  # type: ignore[arg-type]
        while left:
            count = os.preadv(self._file.fileno(), [left], start)
            if not count:
                raise OSError(f"the file ends at byte {start}")
            start, left = start + count, left[count:]

    def read_column(self, group: int, column: str) -> pa.Table:
        """One column of a row group. A Parquet file is read by one thread at a time."""
        assert self._parquet is not None
        with self._lock:
            return self._parquet.read_row_group(group, columns=[column], use_threads=False)
