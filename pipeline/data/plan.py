"""Which rows each lane reads, in which order, in how many steps. Pure numpy: no files, no torch, no Spark.

A run has a fixed number of *lanes*. For each epoch the row groups of the split are permuted with (seed, epoch),
the virtual sequence of rows that results is cut into equal lanes (a cut may fall inside a row group), and rows are
shuffled inside a lane over windows of a few row groups. The global batch of step s is the s-th slice of every lane.
Rank r of W owns lanes r, r + W, ...

What follows, and what the tests hold on to: the rows of every global batch are the same for any W that divides the
lanes; every rank has the same number of steps; every epoch deals all rows anew among the ranks (Goyal et al. 2017,
remark 4); continuing at step s is arithmetic, not re-reading.

Balanced sampling changes one thing: in the sequence that is cut into lanes a row stands as often as
`balanced_copies` says, several times or not at all, so that all classes have equal shares of an epoch. All of the above
holds for it but that every row comes once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.config.training import divisors

# What random numbers are for is part of their seed: numpy takes [seed, epoch] and [seed, epoch, 0, 0] for the same.
_GROUPS, _ROWS, _COPIES = 1, 2, 3
# Multiples of it, modulo 1, spread more evenly over [0, 1) than those of any other number.
_GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Window:
    """A stretch of one lane that is read at once and shuffled.

    segments : int64 array of shape (n, 3), columns (row group, first row, end row) within that row group
    order : int64 array of shape (rows used,), the segments' rows laid end to end in the order of their use: a
        permutation, or with balanced sampling some of them several times and some not at all
    skip : how many rows of ``order`` an earlier attempt has already used
    """

    segments: np.ndarray
    order: np.ndarray
    skip: int

    @property
    def rows_read(self) -> int:
        return int((self.segments[:, 2] - self.segments[:, 1]).sum())


@dataclass(frozen=True)
class EpochPlan:
    """One epoch of one split.

    group_rows : int64 array of shape (row groups,), rows of each row group in the manifest's order
    group_order : int64 array of shape (row groups,), this epoch's permutation of them
    ends : int64 array of shape (row groups,), where each of them ends in that order, in rows or copies of rows
    lane_rows : rows of each lane; fewer than ``lanes`` rows of the split are left out of this epoch's lanes
    steps : global batches in the epoch, the same for every rank
    copies : integer array of shape (rows,), how often each row of the split comes; None: each once
    """

    group_rows: np.ndarray
    group_order: np.ndarray
    ends: np.ndarray
    lanes: int
    lane_batch: int
    lane_rows: int
    steps: int
    shuffle_row_groups: int
    seed: int
    epoch: int
    copies: np.ndarray | None = None


def rank_lanes(rank: int, world_size: int, lanes: int) -> range:
    """The lanes of one rank: rank, rank + world_size, ...

    Raises
    ------
    ValueError
        ``world_size`` does not divide ``lanes``.
    """
    if world_size < 1 or lanes % world_size:
        raise ValueError(f"{world_size} workers do not divide {lanes} lanes: use one of {list(divisors(lanes))}")
    return range(rank, lanes, world_size)


def plan_epoch(
    group_rows: np.ndarray,
    *,
    lanes: int,
    batch_size: int,
    shuffle_row_groups: int,
    seed: int,
    epoch: int,
    copies: np.ndarray | None = None,
) -> EpochPlan:
    """Plan one epoch.

    Parameters
    ----------
    group_rows : int array of shape (row groups,), all above 0
    batch_size : rows of a global batch, a multiple of ``lanes``
    copies : integer array of shape (rows,), how often each row comes (see `balanced_copies`); None: each once

    Raises
    ------
    ValueError
        The batch cannot be cut into lanes, or the split is smaller than one global batch.
    """
    if batch_size % lanes:
        raise ValueError(f"batch_size {batch_size} is not a multiple of lanes {lanes}")
    group_rows = np.asarray(group_rows, dtype=np.int64)
    lengths = group_rows
    if copies is not None:
        lengths = np.add.reduceat(copies, np.cumsum(group_rows) - group_rows, dtype=np.int64)
    total = int(lengths.sum())
    lane_rows, lane_batch = total // lanes, batch_size // lanes
    steps = lane_rows // lane_batch
    if steps < 1:
        raise ValueError(
            f"batch_size {batch_size} is larger than the split: {total} rows in {lanes} lanes; use "
            f"{_lanes_and_batch_for(total, lanes)}"
        )
    order = np.random.default_rng([_GROUPS, seed, epoch]).permutation(len(group_rows))
    ends = np.cumsum(lengths[order])
    return EpochPlan(
        group_rows, order, ends, lanes, lane_batch, lane_rows, steps, shuffle_row_groups, seed, epoch, copies
    )


def _lanes_and_batch_for(total: int, lanes: int) -> str:
    """What fits a split that is smaller than a batch, in one go: with too many lanes no batch size would do."""
    if total >= lanes:
        return f"a train.batch_size of at most {total // lanes * lanes}"
    fewer = max((number for number in divisors(lanes) if number <= total), default=1)
    return f"train.lanes={fewer} and a train.batch_size of at most {max(1, total // fewer) * fewer}"


def balanced_copies(labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """How often each row of a split comes in an epoch in which all classes have equal shares.

    Of N rows in K classes, each class comes T = N // K times, the first N % K classes once more. Row j of the n rows of
    a class comes floor(((j + 1) T + u) / n) - floor((j T + u) / n) times, which is T / n rounded down or up, and T / n
    in the mean over u: systematic sampling (Madow & Madow 1944). The start u is drawn by (seed, class) and moves on by
    the golden ratio from epoch to epoch, so that in the long run all rows of a class come nearly equally often.

    Parameters
    ----------
    labels : int array of shape (rows,), at least 0, in the manifest's order; classes without rows get no share

    Returns
    -------
    Unsigned integer array of shape (rows,), of the smallest type that holds its values; its sum is the number of rows.
    """
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    present = np.flatnonzero(counts)
    starts = (np.random.default_rng([_COPIES, seed]).random(len(counts)) + epoch * _GOLDEN_RATIO) % 1
    shares = len(labels) // len(present) + (np.arange(len(present)) < len(labels) % len(present))
    result = np.empty(len(labels), np.min_scalar_type(int(np.max(-(-shares // counts[present])))))
    first = 0
    for number, share in zip(present.tolist(), shares.tolist(), strict=True):
        rows = int(counts[number])
        before = (np.arange(rows + 1) * share + int(starts[number] * rows)) // rows
        result[by_class[first : first + rows]] = np.diff(before)
        first += rows
    return result


def lane_windows(plan: EpochPlan, lane: int, *, first_step: int = 0) -> Iterator[Window]:
    """The windows of one lane in reading order, from ``first_step`` on; earlier windows are never read."""
    segments = _lane_segments(plan, lane)
    done = first_step * plan.lane_batch
    position = 0
    for number, start in enumerate(range(0, len(segments), plan.shuffle_row_groups)):
        window = segments[start : start + plan.shuffle_row_groups]
        rows = int((window[:, 2] - window[:, 1]).sum())
        if position + rows > done:
            order = np.random.default_rng([_ROWS, plan.seed, plan.epoch, lane, number]).permutation(rows)
            if plan.copies is not None:
                window, copied = _rows_of_copies(plan, window)
                order = copied[order]
            yield Window(window, order, max(0, done - position))
        position += rows


def _lane_segments(plan: EpochPlan, lane: int) -> np.ndarray:
    """Row groups, or parts of them, of one lane: int64 (n, 3) of (row group, first, end), in rows or copies of rows."""
    segments = _segments(plan.ends, lane * plan.lane_rows, (lane + 1) * plan.lane_rows)
    segments[:, 0] = plan.group_order[segments[:, 0]]
    return segments[segments[:, 1] < segments[:, 2]]  # a row group may have no copy of any row


def _rows_of_copies(plan: EpochPlan, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segments of copies as segments of rows, and for each copy its row's place in these, laid end to end."""
    assert plan.copies is not None
    offsets = np.cumsum(plan.group_rows) - plan.group_rows
    row_segments, places, read = segments.copy(), [], 0
    for number, (group, first, end) in enumerate(segments.tolist()):
        copies = plan.copies[offsets[group] : offsets[group] + plan.group_rows[group]]
        rows = np.repeat(np.arange(len(copies)), copies)[first:end]
        row_segments[number, 1:] = rows[0], rows[-1] + 1
        places.append(rows - rows[0] + read)
        read += int(rows[-1]) + 1 - int(rows[0])
    return row_segments, np.concatenate(places)


def step_rows(plan: EpochPlan) -> np.ndarray:
    """Row numbers of every global batch: int64 array of shape (steps, lanes, lane_batch).

    A row's number is its place in the manifest's order of shards and row groups. For tests and reports: the
    reader never builds this array.
    """
    offsets = np.cumsum(plan.group_rows) - plan.group_rows
    used = plan.steps * plan.lane_batch
    lanes = []
    for lane in range(plan.lanes):
        rows = [
            np.concatenate([np.arange(offsets[g] + a, offsets[g] + b) for g, a, b in window.segments])[window.order]
            for window in lane_windows(plan, lane)
        ]
        lanes.append(np.concatenate(rows)[:used].reshape(plan.steps, plan.lane_batch))
    return np.stack(lanes, axis=1)


def rank_slice(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and end row of one rank's part of an evaluation: parts differ by at most one row, none is padded."""
    return rows * rank // world_size, rows * (rank + 1) // world_size


def slice_segments(group_rows: np.ndarray, first: int, end: int) -> np.ndarray:
    """The row groups that rows [first, end) lie in: int64 (n, 3) of (row group, first row, end row)."""
    return _segments(np.cumsum(group_rows, dtype=np.int64), first, end)


def _segments(ends: np.ndarray, first: int, end: int) -> np.ndarray:
    """`slice_segments` for row groups that end at these rows."""
    if first >= end:
        return np.empty((0, 3), np.int64)
    touched = np.arange(np.searchsorted(ends, first, "right"), np.searchsorted(ends, end, "left") + 1)
    segments = np.empty((len(touched), 3), np.int64)
    segments[:, 0] = touched
    starts = np.where(touched > 0, ends[touched - 1], 0)
    segments[:, 1] = np.maximum(first - starts, 0)
    segments[:, 2] = np.minimum(end, ends[touched]) - starts
    return segments
