"""Plan + shards -> batches of uint8 images: the Arrow path.

Images stay uint8 until they are on the device. Row groups are read whole and seen as one numpy array without a
copy; the only copies are the gather into the batch and, on CUDA, the one into pinned memory.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import plan, storage
from pipeline.images import as_rows
from pipeline.manifest import DatasetError, Manifest, Shard

T = TypeVar("T")
MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class Batch:
    """images : uint8 tensor (rows, C, H, W); labels : int64 tensor (rows,)"""

    images: torch.Tensor
    labels: torch.Tensor


class SplitFiles:
    """The row groups of one split, numbered in the manifest's order, read one at a time."""

    def __init__(self, dataset: str, manifest: Manifest, split: str):
        if manifest.image.encoding != "raw":
            raise DatasetError(f"{dataset}: images are {manifest.image.encoding}; this reader reads raw")
        self._dataset = dataset
        self._shape = manifest.image.shape
        self._places = [
            (shard, group) for shard in manifest.split(split).shards for group in range(len(shard.row_groups))
        ]
        self._open: dict[str, pq.ParquetFile] = {}
        self.group_rows = np.array([shard.row_groups[group] for shard, group in self._places], dtype=np.int64)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """One row group: uint8 images (rows, C, H, W), a view of Arrow's memory, and int32 labels (rows,).

        Raises
        ------
        DatasetError
            The shard is missing, cut, or holds other rows than the manifest says; shard and row group are named.
        """
        shard, group = self._places[number]
        try:
            table = self._file(shard).read_row_group(group, columns=["label", "image"])
        except (OSError, pa.ArrowException) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            raise DatasetError(f"{storage.join(self._dataset, shard.path)}, row group {group}: {reason}") from error
        if table.num_rows != shard.row_groups[group]:
            raise DatasetError(
                f"{storage.join(self._dataset, shard.path)}, row group {group}: has {table.num_rows} rows, "
                f"the manifest says {shard.row_groups[group]}"
            )
        labels = table.column("label").to_numpy()
        return self._images(table.column("image"), shard, group), labels

    def close(self) -> None:
        for file in self._open.values():
            file.close(force=True)
        self._open.clear()

    def _file(self, shard: Shard) -> pq.ParquetFile:
        if shard.path not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                self._open.pop(next(iter(self._open))).close(force=True)
            fs, path = storage.filesystem(storage.join(self._dataset, shard.path))
            self._open[shard.path] = pq.ParquetFile(fs.open(path, "rb"), pre_buffer=False)
        return self._open[shard.path]

    def _images(self, column: pa.ChunkedArray, shard: Shard, group: int) -> np.ndarray:
        size = int(np.prod(self._shape))
        chunks = [as_rows(chunk, size) for chunk in column.chunks]
        whole = [chunk for chunk in chunks if chunk is not None]
        if len(whole) < len(chunks):
            raise DatasetError(
                f"{storage.join(self._dataset, shard.path)}, row group {group}: an image is not {size} bytes "
                f"(shape {self._shape})"
            )
        rows = whole[0] if len(whole) == 1 else np.concatenate(whole)
        return rows.reshape(-1, *self._shape)


def train_batches(
    files: SplitFiles,
    epoch_plan: plan.EpochPlan,
    lanes: Sequence[int],
    *,
    first_step: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """One rank's batches of one epoch, lane after lane inside a batch.

    Every batch has ``len(lanes) * lane_batch`` rows; there are ``epoch_plan.steps - first_step`` of them.
    """
    streams = [_lane_stream(files, epoch_plan, lane, first_step) for lane in lanes]
    for _ in range(first_step, epoch_plan.steps):
        parts = [next(stream) for stream in streams]
        images = np.concatenate([part[0] for part in parts])
        labels = np.concatenate([part[1] for part in parts])
        yield _to_batch(images, labels, pin)


def _lane_stream(
    files: SplitFiles, epoch_plan: plan.EpochPlan, lane: int, first_step: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Slices of ``lane_batch`` rows of one lane; a slice may take the end of one window and the start of the next."""
    want = epoch_plan.lane_batch
    rest: list[tuple[np.ndarray, np.ndarray]] = []
    rest_rows = 0
    for window in plan.lane_windows(epoch_plan, lane, first_step=first_step):
        images, labels = _read_segments(files, window.segments)
        order = window.order[window.skip :]
        taken = 0
        while rest_rows + len(order) - taken >= want:
            rows = order[taken : taken + want - rest_rows]
            taken += len(rows)
            parts = [*rest, (images[rows], labels[rows])]
            yield np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
            rest, rest_rows = [], 0
        if taken < len(order):
            rows = order[taken:]
            rest.append((images[rows], labels[rows]))
            rest_rows += len(rows)


def evaluation_batches(
    files: SplitFiles, *, rank: int, world_size: int, batch_size: int, pin: bool = False
) -> Iterator[Batch]:
    """One rank's share of a split, every row exactly once over all ranks; the last batch may be smaller."""
    first, end = plan.rank_slice(int(files.group_rows.sum()), rank, world_size)
    for segment in plan.slice_segments(files.group_rows, first, end):
        images, labels = _read_segments(files, segment[None])
        for start in range(0, len(labels), batch_size):
            yield _to_batch(images[start : start + batch_size], labels[start : start + batch_size], pin)


def _read_segments(files: SplitFiles, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for group, first, end in segments:
        images, labels = files.read(int(group))
        parts.append((images[first:end], labels[first:end]))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _to_batch(images: np.ndarray, labels: np.ndarray, pin: bool) -> Batch:
    # A copy where the array is a view of Arrow's read-only memory: torch has no read-only tensors.
    x = torch.from_numpy(images if images.flags.writeable else images.copy())
    y = torch.from_numpy(labels.astype(np.int64))
    return Batch(x.pin_memory(), y.pin_memory()) if pin else Batch(x, y)


class Prefetch(Generic[T]):
    """Iterate over ``items`` in a background thread, at most ``depth`` ahead; use it in a ``with`` block.

    An exception of ``items`` is raised where the consumer iterates. Leaving the block stops the thread, also when
    not everything was taken.
    """

    def __init__(self, items: Iterator[T], depth: int = 4):
        self._items = items
        self._ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="sparknorm-prefetch", daemon=True)

    def __enter__(self) -> Iterator[T]:
        self._thread.start()
        return self._consume()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _consume(self) -> Iterator[T]:
        while True:
            kind, value = self._ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value

    def _produce(self) -> None:
        try:
            for item in self._items:
                if not self._put("item", item):
                    return
            self._put("end", None)
        except BaseException as error:  # noqa: BLE001 - raised in the consumer's thread
            self._put("error", error)

    def _put(self, kind: str, value: Any) -> bool:
        """False once the consumer has left."""
        while not self._stop.is_set():
            try:
                self._ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
