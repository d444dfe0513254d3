"""Plan + shards -> batches of uint8 images.

A rank has one pool of memory, and a batch is one gather over it; nothing is copied before, and nothing after but, on
CUDA, by the device itself, from pinned memory. A split that fits ``reader.memory_bytes`` stays in the pool once it is
read. Of a larger one each lane has two regions: its rows are gathered from one while background threads fill the other.
Images stay uint8 until they are on the device.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from pipeline.data import plan
from pipeline.data.decoders import Decoders, Decoding
from pipeline.data.manifest import DatasetError
from pipeline.data.pool import Gathering, Load, Pool, concatenated, open_pool
from pipeline.data.shards import SplitFiles

# Small batches are gathered several at once: handing one over costs as much as gathering it.
_BLOCK_BYTES = 2 << 20
# Batches of an epoch whose row numbers are put together at once.
_PLANNED_STEPS = 256


class Batch(NamedTuple):
    """images : uint8 tensor (rows, C, H, W); labels : int64 tensor (rows,); ids : those of the images, int64 (rows,) on
    the host, where they were asked for"""

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor | None = None


Block = list[Batch]
# A block that is gathered: its images, and the labels and ids of each of its batches.
_Coming = tuple[Gathering, Sequence[torch.Tensor], Sequence[torch.Tensor | None]]
Started = TypeVar("Started")


def train_blocks(
    files: SplitFiles,
    plan_of: Callable[[int], plan.EpochPlan],
    lanes: Sequence[int],
    *,
    epochs: int,
    first_epoch: int = 0,
    first_step: int = 0,
    pin: bool = False,
    ids: bool = False,
) -> Iterator[Block]:
    """One rank's batches from a step of an epoch to the end of the last, lane after lane inside a batch.

    They come in blocks of one or several. The start of an epoch is read while the one before it ends.

    Parameters
    ----------
    plan_of : epoch -> its plan; all plans are of one split, with the same lanes and batch size
    epochs : number of the last epoch, plus 1
    ids : whether batches have the images' ids, whose column is else not read
    """
    first = plan_of(first_epoch)
    region_rows = _region_rows(first, resumed=first_step > 0)
    batch_rows = len(lanes) * first.lane_batch
    together = _batches_together(files, batch_rows)
    most = together * batch_rows
    with (
        ThreadPoolExecutor(files.settings.threads, thread_name_prefix="sparknorm-reader") as executor,
        closing(open_pool(files, 2 * len(lanes) * region_rows, executor, most_gathered=most, ids=ids)) as pool,
    ):
        feeds = [
            _Lane(
                pool,
                _loads(plan_of, lane, range(first_epoch, epochs), first_step),
                (2 * number * region_rows, (2 * number + 1) * region_rows),
            )
            for number, lane in enumerate(lanes)
        ]
        try:
            coming = (
                block
                for epoch in range(first_epoch, epochs)
                for block in _epoch(
                    pool, feeds, plan_of(epoch).steps - (first_step if epoch == first_epoch else 0),
                    first.lane_batch, together, pin,
                )
            )  # fmt: skip
            shape = (batch_rows, *files.shape)
            # Images that are decoded are two blocks ahead, so that no decoder waits for another at a block's end.
            yield from (_block(*each, shape) for each in _started_ahead(coming, 2 if blocks_ahead(files) else 0))
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _started_ahead(coming: Iterator[Started], ahead: int) -> Iterator[Started]:
    """The same, each given once so many after it have been started."""
    started: deque[Started] = deque()
    for each in coming:
        started.append(each)
        if len(started) > ahead:
            yield started.popleft()
    yield from started


def _block(
    images: Gathering, labels: Sequence[torch.Tensor], ids: Sequence[torch.Tensor | None], shape: tuple[int, ...]
) -> Block:
    batches = images().view(len(labels), *shape).unbind() if len(labels) > 1 else (images().view(shape),)
    return [Batch(*row) for row in zip(batches, labels, ids, strict=True)]


def train_batches(*args: Any, **options: Any) -> Iterator[Batch]:
    """The batches of `train_blocks`, one by one."""
    for block in train_blocks(*args, **options):
        yield from block


def _batches_together(files: SplitFiles, batch_rows: int) -> int:
    """Batches of a block. A raw batch that is used at once is still in the processor's cache."""
    if not blocks_ahead(files):
        return 1
    return max(1, min(files.settings.prefetch_batches // 2, _BLOCK_BYTES // (batch_rows * files.image_bytes)))


def _epoch(pool: Pool, lanes: list[_Lane], steps: int, lane_batch: int, together: int, pin: bool) -> Iterator[_Coming]:
    done = 0
    while done < steps:
        count = max(1, min(min(lane.ready_rows for lane in lanes) // lane_batch, steps - done, _PLANNED_STEPS))
        parts = [lane.take(count * lane_batch).reshape(count, lane_batch) for lane in lanes]
        rows = np.stack(parts, axis=1).reshape(count, -1)
        labels, ids = pool.labels_at(rows, pin), pool.ids_at(rows)
        for start in range(0, count, together):
            part = slice(start, start + together)
            yield pool.gather(rows[part].reshape(-1), pin), labels[part], ids[part]
        for lane in lanes:
            lane.fill()
        done += count


def _region_rows(epoch_plan: plan.EpochPlan, *, resumed: bool) -> int:
    """Rows of the largest `Load`: windows until they have a lane's part of a batch."""
    window = min(epoch_plan.lane_rows, epoch_plan.shuffle_row_groups * int(epoch_plan.group_rows.max()))
    return epoch_plan.lane_batch + window * (2 if resumed else 1)


def _loads(plan_of: Callable[[int], plan.EpochPlan], lane: int, epochs: range, first_step: int) -> Iterator[Load]:
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
            left, used, read = left - len(order), used + len(order), read + window.rows_read
            if used >= epoch_plan.lane_batch or not left:
                joint = concatenated(orders)
                kept = None if epoch_plan.copies is None else np.unique(joint)
                yield Load(concatenated(segments), joint, kept)
                segments, orders, used, read = [], [], 0, 0
            if not left:
                break


class _Lane:
    """One lane's rows in the pool, in the order of the plan."""

    def __init__(self, pool: Pool, loads: Iterator[Load], regions: tuple[int, int]):
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
        """The next rows, as positions in the pool: int64 (rows,). They stay there until `fill` is called."""
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
        return concatenated(parts)

    def fill(self) -> None:
        """Everything taken was gathered: start to fill the regions that are used up."""
        self._free.extend(self._spent)
        self._spent.clear()
        while self._free and (load := next(self._loads, None)) is not None:
            region = self._free.popleft()
            self._coming.append((region, self._pool.start(load, region), self._pool.positions(load, region)))


def evaluation_blocks(
    files: SplitFiles, *, rank: int, world_size: int, batch_size: int, pin: bool = False
) -> Iterator[Block]:
    """One rank's share of a split, every row exactly once over all ranks; the last batch may be smaller."""
    segments = _evaluation_segments(files, rank, world_size)
    if files.encoding != "raw":
        yield from _decoded_blocks(files, segments, batch_size, pin)
        return
    for number, start, stop in segments:
        images, labels = files.read(number, start, stop)
        for row in range(0, len(labels), batch_size):
            yield [_evaluation_batch(images[row : row + batch_size], labels[row : row + batch_size], pin)]


def _decoded_blocks(files: SplitFiles, segments: list[list[int]], batch_size: int, pin: bool) -> Iterator[Block]:
    """The batches of encoded images. They are decoded in threads: a split to evaluate is often small, and processes
    would have to be started for every evaluation."""

    def batches() -> Iterator[tuple[Decoding, int, np.ndarray]]:
        for number, start, stop in segments:
            stored, labels = files.read_stored(number, start, stop), files.read_labels(number, start, stop)
            for row in range(0, len(labels), batch_size):
                part = slice(row, row + batch_size)
                yield decoders.start(stored[part]), number, labels[part]

    count = files.settings.threads
    with closing(Decoders(files.shape, count=count, most_images=batch_size, processes=False)) as decoders:
        for decoding, number, labels in _started_ahead(batches(), 2):
            images = decoding.result(functools.partial(_damaged, files, number))
            yield [_evaluation_batch(images, labels, pin)]


def _damaged(files: SplitFiles, number: int, _image: int, reason: str) -> DatasetError:
    return files.damaged(number, reason)


def _evaluation_batch(images: np.ndarray, labels: np.ndarray, pin: bool) -> Batch:
    batch = [torch.from_numpy(part) for part in (images, labels)]
    return Batch(*(part.pin_memory() for part in batch)) if pin else Batch(*batch)


def evaluation_ids(files: SplitFiles, *, rank: int, world_size: int) -> np.ndarray:
    """Ids of the images of `evaluation_blocks`, in their order: int64 (rows,)."""
    segments = _evaluation_segments(files, rank, world_size)
    return np.concatenate([np.empty(0, np.int64), *(files.read_ids(*segment) for segment in segments)])


def _evaluation_segments(files: SplitFiles, rank: int, world_size: int) -> list[list[int]]:
    """One rank's part of a split, as [row group, first row, end row]."""
    first, end = plan.rank_slice(int(files.group_rows.sum()), rank, world_size)
    return plan.slice_segments(files.group_rows, first, end).tolist()


def blocks_ahead(files: SplitFiles) -> int:
    """Blocks that are worth making ahead. Gathering raw images takes less time than passing them to another thread."""
    return 0 if files.encoding == "raw" else 2
