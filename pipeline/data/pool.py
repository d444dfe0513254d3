"""One rank's memory of rows: filled by background threads, and gathered from, batch by batch.

A split that fits ``reader.memory_bytes`` stays in its pool once it is read: every row has its own position there. For a
larger one a pool has regions, which are filled anew again and again. Images stay uint8, or encoded as they are stored.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.decoders import Decoders
from pipeline.data.manifest import DatasetError
from pipeline.data.shards import PREFIX, SplitFiles

# Images that are on their way: a call waits for them, uint8, contiguous, of rows x image_bytes values.
Gathering = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Load:
    """Rows of one lane that are read at once, into one region.

    segments : int64 (n, 3) of (row group, first row, end row)
    order : int64 (rows used,), the segments' rows laid end to end, in the order of their use
    kept : int64 (rows kept,), ascending: which of the segments' rows the region holds; None: all
    """

    segments: np.ndarray
    order: np.ndarray
    kept: np.ndarray | None = None


def concatenated(parts: list[np.ndarray]) -> np.ndarray:
    """The parts end to end; a single one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def open_pool(
    files: SplitFiles, rows: int, executor: ThreadPoolExecutor, *, most_gathered: int, ids: bool = False
) -> Pool:
    """The pool that suits a split.

    Parameters
    ----------
    rows : what it must hold at once, where the split does not stay in memory
    executor : its threads read row groups
    most_gathered : images that are gathered at once
    ids : whether it holds the images' ids, too
    """
    if files.encoding == "raw":
        return _RawPool(files, rows, executor, ids)
    return _EncodedPool(files, rows, executor, ids, most_gathered)


def is_resident(files: SplitFiles) -> bool:
    """Whether the split stays in memory once it is read."""
    return files.memory_bytes <= files.settings.memory_bytes


class Pool:
    """Memory for images and labels: for the whole split, where that is allowed, or else for ``rows`` of it.

    A position is the number of a row in this memory; a region is named by its first position.
    """

    def __init__(self, files: SplitFiles, rows: int, executor: ThreadPoolExecutor, ids: bool):
        self.files, self.executor = files, executor
        self._starts = np.cumsum(files.group_rows) - files.group_rows
        self.resident = is_resident(files)
        self.rows = int(files.group_rows.sum()) if self.resident else rows
        self._labels = np.zeros(self.rows, np.int64)
        self._ids = np.zeros(self.rows, np.int64) if ids else None
        self._loaded = np.zeros(len(files.group_rows), bool)
        self._locks = [threading.Lock() for _ in files.group_rows] if self.resident else []

    def start(self, load: Load, region: int) -> Future[None] | None:
        """Begin to read the rows of a load; the result is None where they are here already."""
        if not self.resident:
            return self.executor.submit(self._load, load, region)
        if self._loaded[load.segments[:, 0]].all():
            return None
        return self.executor.submit(self._load_resident, load.segments)

    def positions(self, load: Load, region: int) -> np.ndarray:
        """Where the rows of a load are once it is done, in the order they are used: int64 (rows,)."""
        if not self.resident:
            return region + (load.order if load.kept is None else np.searchsorted(load.kept, load.order))
        parts = [np.arange(first, end) + self._starts[number] for number, first, end in load.segments.tolist()]
        return concatenated(parts)[load.order]

    def labels_at(self, positions: np.ndarray, pin: bool) -> Sequence[torch.Tensor]:
        """The labels at positions, int64 (batches, rows): for each batch int64 (rows,), pinned if asked."""
        labels = torch.from_numpy(self._labels[positions])
        return (labels.pin_memory() if pin else labels).unbind()

    def ids_at(self, positions: np.ndarray) -> Sequence[torch.Tensor | None]:
        """The ids at positions, int64 (batches, rows): for each batch int64 (rows,); None where the pool has none."""
        return [None] * len(positions) if self._ids is None else torch.from_numpy(self._ids[positions]).unbind()

    def load_images(self, number: int, first: int, end: int, rows: slice, kept: np.ndarray | None) -> None:
        """Read rows [first, end) of a row group to the positions ``rows``: all images, or those that are kept."""
        raise NotImplementedError

    def gather(self, positions: np.ndarray, pin: bool) -> Gathering:
        """The images at these positions, int64 (rows,). Raw images must be waited for before the positions are filled
        anew; of encoded ones this call takes what it needs."""
        raise NotImplementedError

    def close(self) -> None:
        """End what belongs to the pool; its memory is kept by what was gathered alone."""

    def empty(self, rows: int, pin: bool) -> torch.Tensor:
        """Memory for images that are gathered: uint8 (rows, image_bytes), pinned if asked."""
        return torch.empty((rows, self.files.image_bytes), dtype=torch.uint8, pin_memory=pin)

    def _load(self, load: Load, region: int) -> None:
        """Read the rows end to end, from the start of the region on."""
        read, kept = 0, None
        for number, first, end in load.segments.tolist():
            if load.kept is not None:
                begin, stop = np.searchsorted(load.kept, (read, read + end - first))
                kept = load.kept[begin:stop] - read
            read += end - first
            region += self._load_rows(number, first, end, region, kept)

    def _load_resident(self, segments: np.ndarray) -> None:
        """Read each row group whole to its own positions; two lanes may want the same one."""
        for number in segments[:, 0].tolist():
            with self._locks[number]:
                if not self._loaded[number]:
                    self._load_rows(number, 0, int(self.files.group_rows[number]), int(self._starts[number]))
                    self._loaded[number] = True

    def _load_rows(self, number: int, first: int, end: int, position: int, kept: np.ndarray | None = None) -> int:
        """Read rows of a row group to a position, and return how many are there now."""
        count = end - first if kept is None else len(kept)
        rows = slice(position, position + count)
        self.load_images(number, first, end, rows, kept)
        labels = self.files.read_labels(number, first, end)
        self._labels[rows] = labels if kept is None else labels[kept]
        if self._ids is not None:
            ids = self.files.read_ids(number, first, end)
            self._ids[rows] = ids if kept is None else ids[kept]
        return count


class _RawPool(Pool):
    """Raw images: side by side where they stay, else as they lie in the file, each behind its length."""

    def __init__(self, files: SplitFiles, rows: int, executor: ThreadPoolExecutor, ids: bool):
        super().__init__(files, rows, executor, ids)
        self._prefix = 0 if self.resident else PREFIX
        # numpy asks for huge pages, torch does not: random rows then miss the address cache less often.
        self._rows = np.empty((self.rows, self._prefix + files.image_bytes), np.uint8)
        self._pixels = torch.from_numpy(self._rows)[:, self._prefix :]

    def load_images(self, number: int, first: int, end: int, rows: slice, kept: np.ndarray | None) -> None:
        target = self._rows[rows]
        if kept is not None:  # a file is read in long pieces, whatever is used of them
            target[:, self._prefix :] = self.files.read_raw(number, first, end)[kept]
        elif self.resident:
            target[:] = self.files.read_raw(number, first, end)
        else:
            self.files.read_raw(number, first, end, target)

    def gather(self, positions: np.ndarray, pin: bool) -> Gathering:
        return functools.partial(self._gather, positions, pin)

    def _gather(self, positions: np.ndarray, pin: bool) -> torch.Tensor:
        # Whole rows are copied; torch's own indexing of uint8, element by element, takes ten times as long.
        if not self.resident:
            return torch.index_select(self._pixels, 0, torch.from_numpy(positions), out=self.empty(len(positions), pin))
        if not pin:
            return torch.from_numpy(self._rows.take(positions, axis=0))
        images = self.empty(len(positions), pin)
        np.take(self._rows, positions, axis=0, out=images.numpy(), mode="clip")
        return images


class _EncodedPool(Pool):
    """PNG or JPEG images as they are stored, decoded in the background when they are gathered."""

    def __init__(self, files: SplitFiles, rows: int, executor: ThreadPoolExecutor, ids: bool, most_gathered: int):
        super().__init__(files, rows, executor, ids)
        self._stored = np.empty(self.rows, object)
        self._groups = np.zeros(self.rows, np.int64)  # where each came from, for an error that names it
        self._decoders = Decoders(
            files.shape,
            count=files.settings.threads,
            most_images=most_gathered,
            processes=files.settings.decode_in == "processes",
        )

    def load_images(self, number: int, first: int, end: int, rows: slice, kept: np.ndarray | None) -> None:
        stored = self.files.read_stored(number, first, end)
        self._stored[rows] = stored if kept is None else [stored[row] for row in kept.tolist()]
        self._groups[rows] = number

    def gather(self, positions: np.ndarray, pin: bool) -> Gathering:
        groups = self._groups[positions]
        decoding = self._decoders.start(self._stored[positions].tolist())

        def damaged(image: int, reason: str) -> DatasetError:
            return self.files.damaged(int(groups[image]), reason)

        def wait() -> torch.Tensor:
            images = torch.from_numpy(decoding.result(damaged))
            return self.empty(len(positions), pin).copy_(images.view(len(positions), -1)) if pin else images

        return wait

    def close(self) -> None:
        self._decoders.close()
