"""Plan + shards -> batches of uint8 images.

A rank has one pool of memory, and a batch is one gather over it; nothing is copied before, and nothing after but, on
CUDA, by the device itself, from pinned memory. A split that fits ``reader.memory_bytes`` stays in the pool once it is
read. Of a larger one each lane has two regions: its rows are gathered from one while background threads fill the other.
Images stay uint8 until they are on the device.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.data import plan
from pipeline.data.shards import PREFIX, SplitFiles

# Small batches are gathered several at once: handing one over costs as much as gathering it.
_BLOCK_BYTES = 2 << 20
# Batches of an epoch whose row numbers are put together at once.
_PLANNED_STEPS = 256


class Batch(NamedTuple):
    """images : uint8 tensor (rows, C, H, W); labels : int64 tensor (rows,)"""

    images: torch.Tensor
    labels: torch.Tensor


Block = list[Batch]


def train_blocks(
    files: SplitFiles,
    plan_of: Callable[[int], plan.EpochPlan],
    lanes: Sequence[int],
    *,
    epochs: int,
    first_epoch: int = 0,
    first_step: int = 0,
    pin: bool = False,
) -> Iterator[Block]:
    """One rank's batches from a step of an epoch to the end of the last, lane after lane inside a batch.

    They come in blocks of one or several. The start of an epoch is read while the one before it ends.

    Parameters
    ----------
    plan_of : epoch -> its plan; all plans are of one split, with the same lanes and batch size
    epochs : number of the last epoch, plus 1
    """
    first = plan_of(first_epoch)
    region_rows = _region_rows(first, resumed=first_step > 0)
    pool_kind = _RawPool if files.encoding == "raw" else _EncodedPool
    with ThreadPoolExecutor(files.settings.threads, thread_name_prefix="sparknorm-reader") as executor:
        pool = pool_kind(files, 2 * len(lanes) * region_rows, executor)
        feeds = [
            _Lane(
                pool,
                _loads(plan_of, lane, range(first_epoch, epochs), first_step),
                (2 * number * region_rows, (2 * number + 1) * region_rows),
            )
            for number, lane in enumerate(lanes)
        ]
        try:
            for epoch in range(first_epoch, epochs):
                steps = plan_of(epoch).steps - (first_step if epoch == first_epoch else 0)
                yield from _epoch(pool, feeds, steps, first.lane_batch, pin)
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def train_batches(*args: Any, **options: Any) -> Iterator[Batch]:
    """The batches of `train_blocks`, one by one."""
    for block in train_blocks(*args, **options):
        yield from block


def _epoch(pool: _Pool, lanes: list[_Lane], steps: int, lane_batch: int, pin: bool) -> Iterator[Block]:
    shape = (len(lanes) * lane_batch, *pool.files.shape)
    together = 1  # a batch that is used at once is still in the processor's cache
    if blocks_ahead(pool.files):
        batch_bytes = shape[0] * pool.files.image_bytes
        together = max(1, min(pool.files.settings.prefetch_batches // 2, _BLOCK_BYTES // batch_bytes))
    done = 0
    while done < steps:
        count = max(1, min(min(lane.ready_rows for lane in lanes) // lane_batch, steps - done, _PLANNED_STEPS))
        parts = [lane.take(count * lane_batch).reshape(count, lane_batch) for lane in lanes]
        rows = np.stack(parts, axis=1).reshape(count, -1)
        labels = pool.labels_at(rows, pin)
        for start in range(0, count, together):
            images = pool.gather(rows[start : start + together].reshape(-1), pin)
            batches = (images.view(shape),) if together == 1 else images.view(-1, *shape).unbind()
            yield [Batch(*pair) for pair in zip(batches, labels[start : start + together], strict=True)]
        for lane in lanes:
            lane.fill()
        done += count


@dataclass(frozen=True)
class _Load:
    """What is read into a region at once. ``order`` are the rows of the region that are used, in their order."""

    segments: np.ndarray
    order: np.ndarray


def _region_rows(epoch_plan: plan.EpochPlan, *, resumed: bool) -> int:
    """Rows of the largest `_Load`: windows until they have a lane's part of a batch."""
    window = min(epoch_plan.lane_rows, epoch_plan.shuffle_row_groups * int(epoch_plan.group_rows.max()))
    return epoch_plan.lane_batch + window * (2 if resumed else 1)


def _loads(plan_of: Callable[[int], plan.EpochPlan], lane: int, epochs: range, first_step: int) -> Iterator[_Load]:
    """What one lane reads, epoch after epoch. Two loads always hold the next batch: each has a lane's part of one."""
    for epoch in epochs:
        epoch_plan = plan_of(epoch)
        skipped = first_step if epoch == epochs.start else 0
        left = (epoch_plan.steps - skipped) * epoch_plan.lane_batch
        segments, orders, used, read = [], [], 0, 0
        for window in plan.lane_windows(epoch_plan, lane, first_step=skipped):
            order = window.order[window.skip :][:left]
            segments.append(window.segments)
            orders.append(order + read if read else order)
            left, used, read = left - len(order), used + len(order), read + len(window.order)
            if used >= epoch_plan.lane_batch or not left:
                yield _Load(_joined(segments), _joined(orders))
                segments, orders, used, read = [], [], 0, 0
            if not left:
                break


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class _Lane:
    """One lane's rows in the pool, in the order of the plan."""

    def __init__(self, pool: _Pool, loads: Iterator[_Load], regions: tuple[int, int]):
        self._pool, self._loads = pool, loads
        self._free = deque(regions)
        self._spent: list[int] = []
        self._coming: deque[tuple[int, Future[None] | None, np.ndarray]] = deque()
        self._region = -1
        self._order = np.empty(0, np.int64)
        self.fill()

    @property
    def ready_rows(self) -> int:
        return len(self._order)

    def take(self, rows: int) -> np.ndarray:
        """The next rows, as places in the pool: int64 (rows,). They stay there until `fill` is called."""
        parts = []
        while rows:
            if not len(self._order):
                self._region, reading, self._order = self._coming.popleft()
                if reading is not None:
                    reading.result()
            part, self._order = self._order[:rows], self._order[rows:]
            parts.append(part)
            rows -= len(part)
            if not len(self._order):
                self._spent.append(self._region)
        return _joined(parts)

    def fill(self) -> None:
        """Everything taken was gathered: start to fill the regions that are used up."""
        self._free.extend(self._spent)
        self._spent.clear()
        while self._free and (load := next(self._loads, None)) is not None:
            region = self._free.popleft()
            self._coming.append((region, self._pool.start(load.segments, region), self._pool.places(load, region)))


class _Pool:
    """Memory for images and labels: for the whole split, where that is allowed, or else for ``rows`` of it."""

    def __init__(self, files: SplitFiles, rows: int, executor: ThreadPoolExecutor):
        self.files, self.executor = files, executor
        self._starts = np.cumsum(files.group_rows) - files.group_rows
        self.resident = is_resident(files)
        self.rows = int(files.group_rows.sum()) if self.resident else rows
        self._labels = np.zeros(self.rows, np.int64)
        self._loaded = np.zeros(len(files.group_rows), bool)
        self._locks = [threading.Lock() for _ in files.group_rows] if self.resident else []

    def start(self, segments: np.ndarray, region: int) -> Future[None] | None:
        """Begin to read row groups, or parts of them; None where they are here already."""
        if self.resident and self._loaded[segments[:, 0]].all():
            return None
        return self.executor.submit(self._load_resident if self.resident else self._load, segments, region)

    def places(self, load: _Load, region: int) -> np.ndarray:
        """Where the rows of a load are once it is done, in the order they are used: int64 (rows,)."""
        if not self.resident:
            return load.order + region
        parts = [np.arange(first, end) + self._starts[number] for number, first, end in load.segments.tolist()]
        return _joined(parts)[load.order]

    def labels_at(self, rows: np.ndarray, pin: bool) -> Sequence[torch.Tensor]:
        labels = torch.from_numpy(self._labels[rows])
        return (labels.pin_memory() if pin else labels).unbind()

    def load_images(self, number: int, first: int, end: int, rows: slice) -> None:
        raise NotImplementedError

    def gather(self, places: np.ndarray, pin: bool) -> torch.Tensor:
        """The images at these places, int64 (rows,): uint8, contiguous, of rows x image_bytes values."""
        raise NotImplementedError

    def empty(self, rows: int, pin: bool) -> torch.Tensor:
        return torch.empty((rows, self.files.image_bytes), dtype=torch.uint8, pin_memory=pin)

    def _load(self, segments: np.ndarray, region: int) -> None:
        """Read them end to end, from a place on."""
        for number, first, end in segments.tolist():
            self._load_rows(number, first, end, region)
            region += end - first

    def _load_resident(self, segments: np.ndarray, region: int) -> None:
        """Read each row group whole to its own place; two lanes may want the same one."""
        for number in segments[:, 0].tolist():
            with self._locks[number]:
                if not self._loaded[number]:
                    self._load_rows(number, 0, int(self.files.group_rows[number]), int(self._starts[number]))
                    self._loaded[number] = True

    def _load_rows(self, number: int, first: int, end: int, place: int) -> None:
        rows = slice(place, place + end - first)
        self.load_images(number, first, end, rows)
        self._labels[rows] = self.files.read_labels(number, first, end)


class _RawPool(_Pool):
    """Raw images: side by side where they stay, else as they lie in the file, each behind its length."""

    def __init__(self, files: SplitFiles, rows: int, executor: ThreadPoolExecutor):
        super().__init__(files, rows, executor)
        self._prefix = 0 if self.resident else PREFIX
        # numpy asks for huge pages, torch does not: random rows then miss the address cache less often.
        self._rows = np.empty((self.rows, self._prefix + files.image_bytes), np.uint8)
        self._pixels = torch.from_numpy(self._rows)[:, self._prefix :]

    def load_images(self, number: int, first: int, end: int, rows: slice) -> None:
        target = self._rows[rows]
        if self.resident:
            target[:] = self.files.read_raw(number, first, end)
        else:
            self.files.read_raw(number, first, end, target)

    def gather(self, places: np.ndarray, pin: bool) -> torch.Tensor:
        # Whole rows are copied; torch's own indexing of uint8, element by element, takes ten times as long.
        if not self.resident:
            return torch.index_select(self._pixels, 0, torch.from_numpy(places), out=self.empty(len(places), pin))
        if not pin:
            return torch.from_numpy(self._rows.take(places, axis=0))
        images = self.empty(len(places), pin)
        np.take(self._rows, places, axis=0, out=images.numpy(), mode="clip")
        return images


class _EncodedPool(_Pool):
    """PNG or JPEG images as they are stored; a batch is decoded by the threads."""

    def __init__(self, files: SplitFiles, rows: int, executor: ThreadPoolExecutor):
        super().__init__(files, rows, executor)
        self._stored = np.empty(self.rows, object)
        self._groups = np.zeros(self.rows, np.int64)  # where each came from, for an error that names it

    def load_images(self, number: int, first: int, end: int, rows: slice) -> None:
        self._stored[rows] = self.files.read_stored(number, first, end)
        self._groups[rows] = number

    def gather(self, places: np.ndarray, pin: bool) -> torch.Tensor:
        images = self.empty(len(places), pin)
        target = images.view(-1, *self.files.shape).numpy()
        share = -(-len(places) // self.files.settings.threads)

        def decode(start: int) -> None:
            for place, row in enumerate(places[start : start + share], start):
                target[place] = self.files.decode(self._stored[row], int(self._groups[row]))

        for _ in self.executor.map(decode, range(0, len(places), share)):
            pass
        return images


def evaluation_blocks(
    files: SplitFiles, *, rank: int, world_size: int, batch_size: int, pin: bool = False
) -> Iterator[Block]:
    """One rank's share of a split, every row exactly once over all ranks; the last batch may be smaller."""
    first, end = plan.rank_slice(int(files.group_rows.sum()), rank, world_size)
    for number, start, stop in plan.slice_segments(files.group_rows, first, end).tolist():
        images, labels = files.read(number, start, stop)
        for row in range(0, len(labels), batch_size):
            batch = [torch.from_numpy(part[row : row + batch_size]) for part in (images, labels)]
            yield [Batch(*(part.pin_memory() for part in batch)) if pin else Batch(*batch)]


def is_resident(files: SplitFiles) -> bool:
    """Whether the split stays in memory once it is read."""
    return files.memory_bytes <= files.settings.memory_bytes


def blocks_ahead(files: SplitFiles) -> int:
    """Blocks that are worth making ahead. Gathering raw images takes less time than passing them to another thread."""
    return 0 if files.encoding == "raw" else 2
